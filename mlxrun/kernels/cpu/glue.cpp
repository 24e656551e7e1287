// The operations that the kernels make, and the functions that native.py calls.
//
// Compiled against the headers of one MLX, which it only fits; see objects.h for Python's side.
#include "kernels.h"
#include "mapping.h"
#include "operation.h"

#include <cmath>

#include "mlx/version.h"

namespace {

const kernels::Core* core = nullptr;

// ---- matrices -----------------------------------------------------------------------------------

// A matrix among an operation's constants.
struct Weights {
  int32_t type, rows;
  int blocks, order, bias;
};

std::vector<Weights> weights_of(Operation& operation, int count, const int32_t* types,
                                PyObject* constants) {
  std::vector<Weights> weights;
  for (int i = 0; i < count; i++) {
    int blocks = operation.constant(constants, 3 * i);
    require(blocks != ABSENT, "a matrix has no blocks");
    int32_t rows = operation.constants[blocks].shape(-2);
    require(core->known(types[i]), "a type of blocks whose kernels are not loaded");
    weights.push_back({types[i], rows, blocks, operation.constant(constants, 3 * i + 1),
                       operation.constant(constants, 3 * i + 2)});
  }
  return weights;
}

// Where several matrices, their biases and their results are, as kernels take them.
class Several {
 public:
  Several(const Operation& operation, const std::vector<Weights>& weights, const Arrays& in,
          Arrays& out) {
    for (const Weights& w : weights) {
      matrices_.push_back({operation.pointer<uint8_t>(in, w.blocks),
                           operation.pointer<int32_t>(in, w.order), w.type, w.rows});
      biases_.push_back(operation.pointer<float>(in, w.bias));
    }
    for (mx::array& output : out) outs_.push_back(output.data<float>());
  }

  template <class Kernel>
  void fill(Kernel& kernel) const {
    kernel.matrices = matrices_.data(), kernel.count = static_cast<int32_t>(matrices_.size());
    kernel.biases = biases_.data(), kernel.outs = outs_.data();
  }

 private:
  std::vector<kernels::Matrix> matrices_;
  std::vector<const float*> biases_;
  std::vector<float*> outs_;
};

class Product : public Operation {
 public:
  const char* name() const override { return "BlockProduct"; }

  std::vector<mx::Shape> shapes(const Arrays& in) const override {
    const mx::array& x = in[0];
    require(x.ndim() > 0 && x.shape(-1) == columns, "x has another number of columns");
    std::vector<mx::Shape> shapes(gate ? 1 : weights.size(), x.shape());
    for (size_t i = 0; i < shapes.size(); i++) shapes[i].back() = weights[i].rows;
    require(given(in) == 1 || in[1].shape() == shapes[0], "the residual has another shape");
    return shapes;
  }

  Task task(const Arrays& in, Arrays& out, Reader& reader) const override {
    kernels::Product product = {};
    product.columns = columns, product.planes = planes;
    product.rows = static_cast<int32_t>(in[0].size() / columns);
    product.x = reader.dense<float>(in[0]);
    product.normed = normed, product.eps = eps, product.norm = pointer<float>(in, norm);
    product.gate = gate;
    if (given(in) > 1) product.residual = reader.dense<float>(in[1]);
    return [product, several = Several(*this, weights, in, out)]() mutable {
      several.fill(product);
      core->product(&product);
    };
  }

  std::vector<Weights> weights;
  int32_t columns, planes, normed, gate;
  float eps;
  int norm;
};

class Experts : public Operation {
 public:
  const char* name() const override { return "BlockExperts"; }
  mx::Dtype dtype(size_t input) const override { return input == 1 ? mx::uint32 : mx::float32; }

  // x (..., 1 or K, 1, columns), chosen (..., K): (..., K, 1, rows)
  std::vector<mx::Shape> shapes(const Arrays& in) const override {
    const mx::Shape &x = in[0].shape(), &chosen = in[1].shape();
    size_t lead = chosen.size() - 1;
    require(!chosen.empty() && x.size() == lead + 3 &&
                std::equal(chosen.begin(), chosen.begin() + lead, x.begin()) &&
                (x[lead] == 1 || x[lead] == chosen[lead]) && x[lead + 1] == 1,
            "x and the chosen experts have shapes that do not fit");
    require(x.back() == columns, "x has another number of columns");
    std::vector<mx::Shape> shapes(gate ? 1 : weights.size(), chosen);
    for (size_t i = 0; i < shapes.size(); i++) {
      shapes[i].push_back(1);
      shapes[i].push_back(weights[i].rows);
    }
    return shapes;
  }

  Task task(const Arrays& in, Arrays& out, Reader& reader) const override {
    kernels::Experts experts = {};
    experts.columns = columns, experts.planes = planes, experts.gate = gate;
    experts.used = in[1].shape(-1), experts.rows_per_token = in[0].shape(-3);
    experts.tokens = static_cast<int32_t>(in[1].size() / experts.used);
    experts.experts = in[given(in) + weights[0].blocks].shape(0);
    experts.x = reader.dense<float>(in[0]), experts.chosen = reader.dense<uint32_t>(in[1]);
    return [experts, several = Several(*this, weights, in, out)]() mutable {
      several.fill(experts);
      core->experts(&experts);
    };
  }

  std::vector<Weights> weights;
  int32_t columns, planes, gate;
};

class Take : public Operation {
 public:
  const char* name() const override { return "BlockTake"; }
  mx::Dtype dtype(size_t) const override { return mx::int32; }
  bool as_input() const override { return false; }

  std::vector<mx::Shape> shapes(const Arrays& in) const override {
    mx::Shape shape = in[0].shape();
    shape.push_back(columns);
    return {shape};
  }

  Task task(const Arrays& in, Arrays& out, Reader& reader) const override {
    kernels::Take take = {};
    take.matrix = {pointer<uint8_t>(in, weights.blocks), pointer<int32_t>(in, weights.order),
                   weights.type, weights.rows};
    take.columns = columns, take.count = static_cast<int32_t>(in[0].size());
    take.ids = reader.dense<int32_t>(in[0]), take.out = out[0].data<float>();
    return [take]() mutable {
      auto missing = [&](int32_t id) { return id < 0 || id >= take.matrix.rows; };
      std::vector<int32_t> ids(take.ids, take.ids + take.count);
      std::replace_if(ids.begin(), ids.end(), missing, 0);
      const int32_t* given = std::exchange(take.ids, ids.data());
      core->take(&take);
      // A row that does not exist is no number, rather than what lies elsewhere in memory.
      for (int64_t i = 0; i < take.count; i++) {
        if (!missing(given[i])) continue;
        std::fill_n(take.out + i * take.columns, take.columns, NAN);
      }
    };
  }

  Weights weights;
  int32_t columns;
};

// ---- the small operations of a step -------------------------------------------------------------

int32_t rows_of(const mx::array& x) {
  return static_cast<int32_t>(x.size() / std::max(x.shape(-1), 1));
}

class RmsNorm : public Operation {
 public:
  const char* name() const override { return "BlockRmsNorm"; }

  std::vector<mx::Shape> shapes(const Arrays& in) const override {
    require(in[0].ndim() > 0, "x has no axis");
    require(weight == ABSENT || in[given(in) + weight].shape(-1) == in[0].shape(-1),
            "the norm is of another size than x");
    require(given(in) == 1 || in[1].shape() == in[0].shape(), "the residual has another shape");
    return {in[0].shape()};
  }

  Task task(const Arrays& in, Arrays& out, Reader& reader) const override {
    kernels::RmsNorm norm = {};
    norm.x = reader.dense<float>(in[0]), norm.rows = rows_of(in[0]);
    norm.columns = in[0].shape(-1), norm.eps = eps, norm.weight = pointer<float>(in, weight);
    if (given(in) > 1) norm.residual = reader.dense<float>(in[1]);
    norm.out = out[0].data<float>();
    return [norm] { core->rms_norm(&norm); };
  }

  int weight;
  float eps;
};

// Inputs: projections (B, T, H D) or (B, H D), and the position of the first token, or of each
// row's.
class Heads : public Operation {
 public:
  struct Part {
    int32_t heads, dim, norm_at, traditional;
    float eps, scale;
    int norm, frequencies;
  };

  const char* name() const override { return "BlockHeads"; }
  mx::Dtype dtype(size_t input) const override {
    return input == parts.size() ? mx::int32 : mx::float32;
  }

  std::vector<mx::Shape> shapes(const Arrays& in) const override {
    std::vector<mx::Shape> shapes;
    for (size_t i = 0; i < parts.size(); i++) {
      const mx::array& x = in[i];
      const Part& part = parts[i];
      require(x.ndim() == 2 || x.ndim() == 3, "projections have two or three axes");
      require(x.shape(-1) == part.heads * part.dim, "a projection is of another size");
      auto size = [&](int constant) { return in[given(in) + constant].size(); };
      require(part.norm == ABSENT || size(part.norm) == static_cast<size_t>(part.dim),
              "the norm of heads is of another size");
      require(part.frequencies == ABSENT ||
                  2 * size(part.frequencies) <= static_cast<size_t>(part.dim),
              "there are more frequencies than pairs of numbers in a head");
      require(in[parts.size()].size() == 1 ||
                  in[parts.size()].size() == static_cast<size_t>(x.shape(0)),
              "positions are one, or one for each row");
      shapes.push_back({x.shape(0), part.heads, x.ndim() == 3 ? x.shape(1) : 1, part.dim});
    }
    return shapes;
  }

  Task task(const Arrays& in, Arrays& out, Reader& reader) const override {
    std::vector<kernels::Heads> all;
    const mx::array& positions = in[parts.size()];
    const int32_t* first = reader.dense<int32_t>(positions);
    for (size_t i = 0; i < parts.size(); i++) {
      const Part& part = parts[i];
      mx::Strides strides;
      kernels::Heads heads = {};
      heads.x = reader.rows<float>(in[i], strides);
      heads.batch_stride = strides[0], heads.token_stride = in[i].ndim() == 3 ? strides[1] : 0;
      heads.batch = out[i].shape(0), heads.tokens = out[i].shape(2);
      heads.heads = part.heads, heads.dim = part.dim;
      heads.norm_at = part.norm_at, heads.eps = part.eps;
      heads.norm = pointer<float>(in, part.norm);
      heads.frequencies = pointer<float>(in, part.frequencies);
      if (heads.frequencies) {
        heads.dims = 2 * static_cast<int32_t>(in[given(in) + part.frequencies].size());
      }
      heads.scale = part.scale, heads.traditional = part.traditional;
      heads.positions = first, heads.shared = positions.size() == 1;
      heads.out = out[i].data<float>();
      all.push_back(heads);
    }
    return [all = std::move(all)] { core->heads(all.data(), static_cast<int32_t>(all.size())); };
  }

  std::vector<Part> parts;
};

// Inputs: q (B, H, T, D), k (B, K, S, D), v (B, K, S, E), and booleans that broadcast to
// (B, 1, T, S), if any. The output (B, H, T, E) lies in memory as (B, T, H, E).
class Attention : public Operation {
 public:
  const char* name() const override { return "BlockAttention"; }
  mx::Dtype dtype(size_t input) const override { return input == 3 ? mx::bool_ : mx::float32; }

  std::vector<mx::Shape> shapes(const Arrays& in) const override {
    const mx::array &q = in[0], &k = in[1], &v = in[2];
    require(q.ndim() == 4 && k.ndim() == 4 && v.ndim() == 4, "q, k and v have four axes");
    require(q.shape(0) == k.shape(0) && k.shape(0) == v.shape(0) && k.shape(1) == v.shape(1) &&
                k.shape(1) > 0 && q.shape(1) % k.shape(1) == 0 && k.shape(2) == v.shape(2) &&
                q.shape(3) == k.shape(3),
            "q, k and v have shapes that do not fit");
    if (given(in) > 3) {
      const mx::Shape& mask = in[3].shape();
      const int sizes[] = {q.shape(0), 1, q.shape(2), k.shape(2)};
      require(mask.size() >= 1 && mask.size() <= 4, "the mask has too many axes");
      for (size_t i = 1; i <= mask.size(); i++) {
        int size = mask[mask.size() - i];
        require(size == 1 || size == sizes[4 - i], "the mask has a shape that does not fit");
      }
    }
    for (int each : {sinks, slopes}) {
      require(each == ABSENT || static_cast<int>(in[given(in) + each].size()) == q.shape(1),
              "there is one sink and one slope for each head");
    }
    return {{q.shape(0), q.shape(1), q.shape(2), v.shape(3)}};
  }

  void allocate(mx::array& out) const override {
    int64_t heads = out.shape(1), tokens = out.shape(2), dim = out.shape(3);
    mx::Strides strides{tokens * heads * dim, dim, heads * dim, 1};
    bool in_order = heads == 1 || tokens == 1;
    out.set_data(mx::allocator::malloc(out.nbytes()), out.size(), strides,
                 {true, in_order, out.size() <= 1});
  }

  Task task(const Arrays& in, Arrays& out, Reader& reader) const override {
    kernels::Attention a = {};
    mx::Strides q, k, v;
    a.q = reader.rows<float>(in[0], q);
    a.k = reader.rows<float>(in[1], k);
    a.v = reader.rows<float>(in[2], v);
    a.batch = in[0].shape(0), a.heads = in[0].shape(1), a.kv_heads = in[1].shape(1);
    a.tokens = in[0].shape(2), a.keys = in[1].shape(2);
    a.dim = in[0].shape(3), a.value_dim = in[2].shape(3);
    a.q_batch = q[0], a.q_head = q[1], a.q_token = q[2];
    a.k_batch = k[0], a.k_head = k[1], a.k_key = k[2];
    a.v_batch = v[0], a.v_head = v[1], a.v_key = v[2];
    a.scale = scale, a.softcap = softcap, a.causal = causal;
    a.sinks = pointer<float>(in, sinks), a.slopes = pointer<float>(in, slopes);
    if (given(in) > 3) {
      const mx::array& mask = in[3];
      auto stride = [&](int axis) -> int64_t {  // counted from the last
        int dimensions = static_cast<int>(mask.ndim());
        return axis > dimensions || mask.shape(-axis) == 1 ? 0 : mask.strides(-axis);
      };
      a.mask = mask.data<uint8_t>();
      a.mask_key = stride(1), a.mask_token = stride(2), a.mask_batch = stride(4);
    }
    a.out = out[0].data<float>();
    a.out_batch = out[0].strides(0), a.out_head = out[0].strides(1);
    a.out_token = out[0].strides(2);
    return [a] { core->attention(&a); };
  }

  float scale, softcap;
  int32_t causal;
  int sinks, slopes;
};

class Gated : public Operation {
 public:
  const char* name() const override { return "BlockGated"; }

  std::vector<mx::Shape> shapes(const Arrays& in) const override {
    require(in[0].shape() == in[1].shape(), "the two sides have different shapes");
    return {in[0].shape()};
  }

  Task task(const Arrays& in, Arrays& out, Reader& reader) const override {
    kernels::Gated gated = {gate, static_cast<int64_t>(in[0].size()), reader.dense<float>(in[0]),
                            reader.dense<float>(in[1]), out[0].data<float>()};
    return [gated] { core->gated(&gated); };
  }

  int32_t gate;
};

class Softmax : public Operation {
 public:
  const char* name() const override { return "BlockSoftmax"; }

  std::vector<mx::Shape> shapes(const Arrays& in) const override {
    require(in[0].ndim() > 0, "x has no axis");
    return {in[0].shape()};
  }

  Task task(const Arrays& in, Arrays& out, Reader& reader) const override {
    kernels::Softmax softmax = {reader.dense<float>(in[0]), rows_of(in[0]), in[0].shape(-1),
                                out[0].data<float>()};
    return [softmax] { core->softmax(&softmax); };
  }
};

// ---- mapped files as arrays ---------------------------------------------------------------------

// Whether a buffer's handle is the address of its size, and its memory follows, as with MLX's CPU
// allocator: then any memory with its size before it can be a buffer.
bool has_plain_buffers() {
  for (size_t size : {size_t{64}, size_t{1} << 16}) {
    mx::array probe(mx::Shape{static_cast<int>(size)}, mx::uint8, nullptr, {});
    probe.set_data(mx::allocator::malloc(size));
    mx::allocator::Buffer buffer = probe.buffer();
    char *handle = static_cast<char*>(buffer.ptr()), *memory = static_cast<char*>(buffer.raw_ptr());
    size_t stated = 0;
    if (memory != handle + sizeof stated) return false;
    std::memcpy(&stated, handle, sizeof stated);
    if (stated < size || stated != probe.buffer_size()) return false;
  }
  return true;
}

template <class Array>
void set_foreign(Array& array, mx::allocator::Buffer buffer,
                 std::function<void(mx::allocator::Buffer)> drop) {
  if constexpr (requires { array.set_data(buffer, drop); }) {
    array.set_data(buffer, drop);
  } else {  // since 0.32.4
    array.set_data(typename Array::Data(buffer, drop));
  }
}

template <class Array>
Array shared_with_gpu(char* start, const mx::Shape& shape, std::function<void(void*)> drop) {
  if constexpr (requires { Array(start, shape, mx::uint8, drop); }) {
    return Array(start, shape, mx::uint8, drop);
  } else {
    throw std::runtime_error("this version of MLX cannot take mapped memory");
  }
}

// Bytes of a mapped file, without a copy: a view of an array of whole pages. On a CPU these are the
// file's, before which its length stands; a GPU gets only those that it needs.
mx::array adopted(const std::shared_ptr<mapping::Mapping>& mapped, size_t offset, mx::Shape shape) {
  static const bool plain = has_plain_buffers();
  size_t bytes = 1, page = mapping::page_size;
  for (int size : shape) bytes *= size;
  size_t first = plain ? 0 : offset / page, last = plain ? mapped->length : offset + bytes;
  mx::Shape whole{static_cast<int>((last + page - 1) / page - first), static_cast<int>(page)};
  char* start = mapped->data + first * page;
  mx::array base(whole, mx::uint8, nullptr, {});
  if (plain) {
    set_foreign(base, mx::allocator::Buffer(start - sizeof(size_t)),
                [mapped](mx::allocator::Buffer) {});
  } else {
    base = shared_with_gpu<mx::array>(start, whole, [mapped](void*) {});
  }
  mx::array view(shape, mx::uint8, nullptr, {});
  view.copy_shared_buffer(base, view.strides(), {true, true, view.ndim() == 1}, bytes,
                          static_cast<int64_t>(offset - first * page));
  view.set_status(mx::array::Status::available);
  return view;
}

// An operation as Python holds it.
using Handle = std::shared_ptr<const Operation>;

template <class Made, class Function>
void* make(Function fill) {
  void* made = nullptr;
  guarded([&]() -> PyObject* {
    auto operation = std::make_shared<Made>();
    fill(*operation);
    made = new Handle(std::move(operation));
    return nullptr;
  });
  return made;
}

}  // namespace

// ---- called by native.py ------------------------------------------------------------------------

extern "C" {

// Which interface this was compiled for: of the kernels, and of MLX.
int32_t glue_abi() { return kernels::ABI; }
int32_t glue_mlx() { return MLX_VERSION_NUMERIC; }
const char* glue_mlx_version() { return mx::version(); }

// Python objects given here stay alive for as long as the process. -1: a core of another version.
int32_t glue_start(const kernels::Core* functions, ptrdiff_t header, PyObject* type,
                   PyObject* none, PyObject* create) {
  if (functions->abi != kernels::ABI) return -1;
  core = functions;
  layout = {header, type, none, create};
  return 0;
}

void glue_threads(int32_t count, double spin, int32_t pinned) {
  core->threads(count, spin, pinned);
}
int32_t glue_add(const kernels::Format* format) { return core->add(format); }

// What an array object looks like: (dimensions, bytes per item, shape...), so that Python can
// compare it with what it knows.
int32_t glue_probe(PyObject* object, int32_t* found, int32_t size) {
  PyObject* done = guarded([&] {
    const mx::array& array = array_of(object);
    found[0] = static_cast<int32_t>(array.ndim());
    found[1] = static_cast<int32_t>(array.itemsize());
    for (int i = 0; i < found[0] && i + 2 < size; i++) found[i + 2] = array.shape(i);
    return object;
  });
  return done ? 0 : -1;
}

// A list of the results of an operation for a tuple of arrays; or the one result.
PyObject* glue_apply(const void* operation, PyObject* inputs) {
  return guarded([&]() -> PyObject* {
    Arrays in;
    ptrdiff_t count = PyTuple_Size(inputs);
    const Handle& applied = *static_cast<const Handle*>(operation);
    in.reserve(count + applied->constants.size());
    for (ptrdiff_t i = 0; i < count; i++) in.push_back(array_of(PyTuple_GetItem(inputs, i)));
    Arrays out = apply(applied, std::move(in));
    PyObject* list = PyList_New(static_cast<ptrdiff_t>(out.size()));
    for (size_t i = 0; list && i < out.size(); i++) {
      PyObject* item = object_of(std::move(out[i]));
      if (!item) {
        Py_DecRef(list);
        return nullptr;
      }
      PyList_SetItem(list, static_cast<ptrdiff_t>(i), item);
    }
    return list;
  });
}

void glue_free(const void* operation) { delete static_cast<const Handle*>(operation); }

// Constants of matrices are (blocks, order, bias) of each, then what else there is.

void* glue_product(int32_t count, const int32_t* types, int32_t columns, int32_t planes,
                   int32_t normed, float eps, int32_t gate, int32_t residual,
                   PyObject* constants) {
  return make<Product>([&](Product& product) {
    product.weights = weights_of(product, count, types, constants);
    product.norm = product.constant(constants, 3 * count);
    product.columns = columns, product.planes = planes, product.normed = normed;
    product.eps = eps, product.gate = gate;
    product.least = product.most = residual ? 2 : 1;
  });
}

void* glue_experts(int32_t count, const int32_t* types, int32_t columns, int32_t planes,
                   int32_t gate, PyObject* constants) {
  return make<Experts>([&](Experts& experts) {
    experts.weights = weights_of(experts, count, types, constants);
    experts.columns = columns, experts.planes = planes, experts.gate = gate;
    experts.least = experts.most = 2;
  });
}

void* glue_take(int32_t type, int32_t columns, PyObject* constants) {
  return make<Take>([&](Take& take) {
    take.weights = weights_of(take, 1, &type, constants)[0];
    take.columns = columns;
  });
}

void* glue_rms_norm(float eps, PyObject* constants) {
  return make<RmsNorm>([&](RmsNorm& norm) {
    norm.weight = norm.constant(constants, 0);
    norm.eps = eps, norm.most = 2;
  });
}

// `kinds`: heads, dim, where the norm is, whether neighbors rotate together, of each; `numbers`:
// epsilon and scale; `constants`: norm and frequencies.
void* glue_heads(int32_t count, const int32_t* kinds, const float* numbers, PyObject* constants) {
  return make<Heads>([&](Heads& heads) {
    for (int i = 0; i < count; i++) {
      const int32_t* kind = kinds + 4 * i;
      heads.parts.push_back({kind[0], kind[1], kind[2], kind[3], numbers[2 * i],
                             numbers[2 * i + 1], heads.constant(constants, 2 * i),
                             heads.constant(constants, 2 * i + 1)});
    }
    heads.least = heads.most = static_cast<size_t>(count) + 1;
  });
}

void* glue_attention(float scale, float softcap, int32_t causal, PyObject* constants) {
  return make<Attention>([&](Attention& attention) {
    attention.scale = scale, attention.softcap = softcap, attention.causal = causal;
    attention.sinks = attention.constant(constants, 0);
    attention.slopes = attention.constant(constants, 1);
    attention.least = 3, attention.most = 4;
  });
}

void* glue_gated(int32_t gate) {
  return make<Gated>([&](Gated& gated) {
    gated.gate = gate;
    gated.least = gated.most = 2;
  });
}

void* glue_softmax() {
  return make<Softmax>([](Softmax&) {});
}

// Bytes of an open file as an array of a shape (uint8); `id` becomes that of the mapping.
PyObject* glue_map(int32_t descriptor, int64_t offset, const int32_t* shape, int32_t dimensions,
                   int64_t* id) {
  return guarded([&] {
    auto mapped = mapping::Mapping::of(descriptor);
    size_t end = static_cast<size_t>(offset), bytes = 1;
    for (int i = 0; i < dimensions; i++) bytes *= shape[i];
    require(end + bytes <= mapped->length, "the file has ended before");
    *id = mapped->id;
    return object_of(adopted(mapped, end, mx::Shape(shape, shape + dimensions)));
  });
}

// How often a mapped file was found to have been cut, to be read at any time.
const int32_t* glue_cuts() { return reinterpret_cast<const int32_t*>(&mapping::cuts); }
int64_t glue_first_missing(int64_t id) { return mapping::first_missing(id); }

}  // extern "C"
