// Operations as primitives of MLX's graph.
//
// An operation is made once, with its constants (weights are inputs of the graph, so MLX keeps them
// alive), and applied many times; each application is a primitive. Inputs that do not lie in order
// are copied when they are computed, not when the graph is built: most of them lie in order, and
// what is not in the graph costs nothing.
#pragma once
#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"
#include "objects.h"

namespace {

using Arrays = std::vector<mx::array>;
using Task = std::function<void()>;

// Of the thread: kernels run on the CPU, whatever the default device is.
mx::Stream cpu_stream() { return mx::default_stream(mx::Device(mx::Device::cpu)); }

// An input that does not lie in order, and where its copy goes.
struct Copy {
  const char* from;
  char* to;
  size_t itemsize;
  mx::Shape shape;
  mx::Strides strides;  // in items

  void run() const {
    size_t width = shape.empty() ? 1 : shape.back(), count = 1;
    for (int size : shape) count *= size;
    if (count == 0) return;
    int64_t step = shape.empty() ? 1 : strides.back();
    std::vector<int> at(shape.size(), 0);
    for (char* out = to; out != to + count * itemsize; out += width * itemsize) {
      int64_t place = 0;
      for (size_t axis = 0; axis + 1 < at.size(); axis++) place += at[axis] * strides[axis];
      const char* row = from + place * static_cast<int64_t>(itemsize);
      if (step == 1) {
        std::memcpy(out, row, width * itemsize);
      } else {
        for (size_t i = 0; i < width; i++) {
          std::memcpy(out + i * itemsize, row + static_cast<int64_t>(i * itemsize) * step,
                      itemsize);
        }
      }
      for (int axis = static_cast<int>(at.size()) - 2; axis >= 0; axis--) {
        if (++at[axis] < shape[axis]) break;
        at[axis] = 0;
      }
    }
  }
};

// Where the numbers of inputs are once the copies have run.
class Reader {
 public:
  explicit Reader(mx::cpu::CommandEncoder& encoder) : encoder_(encoder) {}

  // In row-major order.
  template <class T>
  const T* dense(const mx::array& input) {
    return input.flags().row_contiguous ? input.data<T>() : copied<T>(input);
  }

  // With strides, but the numbers of the last axis together.
  template <class T>
  const T* rows(const mx::array& input, mx::Strides& strides) {
    bool together = input.strides(-1) == 1 || input.shape(-1) == 1;
    const T* numbers = together ? input.data<T>() : copied<T>(input);
    strides = together ? input.strides() : dense_strides(input.shape());
    return numbers;
  }

  std::vector<Copy> copies;

 private:
  static mx::Strides dense_strides(const mx::Shape& shape) {
    mx::Strides strides(shape.size(), 1);
    for (int i = static_cast<int>(shape.size()) - 1; i > 0; i--) {
      strides[i - 1] = strides[i] * shape[i];
    }
    return strides;
  }

  template <class T>
  const T* copied(const mx::array& input) {
    mx::array copy(input.shape(), input.dtype(), nullptr, {});
    copy.set_data(mx::allocator::malloc(copy.nbytes()));
    encoder_.add_temporary(copy);
    copies.push_back({input.data<char>(), copy.data<char>(), input.itemsize(), input.shape(),
                      input.strides()});
    return copy.data<T>();
  }

  mx::cpu::CommandEncoder& encoder_;
};

// Constants that an operation may lack have this index.
constexpr int ABSENT = -1;

class Operation {
 public:
  virtual ~Operation() = default;
  virtual const char* name() const = 0;
  // Of the outputs. Throws where the inputs do not fit; constants come last among them.
  virtual std::vector<mx::Shape> shapes(const Arrays& in) const = 0;
  virtual Task task(const Arrays& in, Arrays& out, Reader& reader) const = 0;
  // The type of each input as the kernels take it. The first of a kind stands for those beyond.
  virtual mx::Dtype dtype(size_t) const { return mx::float32; }
  // Whether the results have the first input's type, rather than float32.
  virtual bool as_input() const { return true; }
  virtual void allocate(mx::array& out) const {
    out.set_data(mx::allocator::malloc(out.nbytes()));
  }

  // How many inputs an application may have besides the constants.
  size_t least = 1, most = 1;
  Arrays constants;

  // Takes a tuple's item as a constant; None is absent.
  int constant(PyObject* tuple, ptrdiff_t index) {
    PyObject* item = PyTuple_GetItem(tuple, index);
    if (item == layout.none) return ABSENT;
    mx::array given = array_of(item);
    require(given.status() != mx::array::Status::unscheduled, "constants must be evaluated");
    if (!given.flags().row_contiguous) {  // else it stays where it is: MLX might copy a mapped file
      given = mx::contiguous(given, false, cpu_stream());
      given.eval();
    }
    constants.push_back(given);
    return static_cast<int>(constants.size()) - 1;
  }

  // How many of the inputs are none of the constants.
  size_t given(const Arrays& in) const { return in.size() - constants.size(); }

  template <class T>
  const T* pointer(const Arrays& in, int constant) const {
    return constant == ABSENT ? nullptr : in[given(in) + constant].data<T>();
  }
};

class Applied : public mx::Primitive {
 public:
  Applied(mx::Stream stream, std::shared_ptr<const Operation> operation)
      : mx::Primitive(stream), operation_(std::move(operation)) {}

  void eval_cpu(const Arrays& in, Arrays& out) override {
    auto& encoder = mx::cpu::get_command_encoder(stream());
    for (const mx::array& input : in) encoder.set_input_array(input);
    bool empty = true;
    for (mx::array& output : out) {
      operation_->allocate(output);
      encoder.set_output_array(output);
      empty = empty && output.size() == 0;
    }
    if (empty) return;
    Reader reader(encoder);
    Task task = operation_->task(in, out, reader);
    if (reader.copies.empty()) {
      encoder.dispatch(std::move(task));
      return;
    }
    encoder.dispatch([task = std::move(task), copies = std::move(reader.copies)] {
      for (const Copy& copy : copies) copy.run();
      task();
    });
  }
  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error("block kernels of the CPU cannot run on a GPU's stream");
  }
  const char* name() const override { return operation_->name(); }
  // Of the same inputs, which include the constants.
  bool is_equivalent(const mx::Primitive& other) const override {
    return static_cast<const Applied&>(other).operation_ == operation_;
  }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override {
    return operation_->shapes(in);
  }

 private:
  std::shared_ptr<const Operation> operation_;
};

mx::array converted(const mx::array& input, mx::Dtype wanted, mx::Stream stream) {
  if (input.dtype() == wanted) return input;
  bool floats = wanted == mx::float32;
  bool fits = floats ? mx::issubdtype(input.dtype(), mx::floating) && input.itemsize() < 8
                     : wanted != mx::bool_ && mx::issubdtype(input.dtype(), mx::integer);
  require(fits, floats                ? "floating-point numbers of at most 32 bits are needed"
                : wanted == mx::bool_ ? "a mask must be of booleans"
                                      : "indices must be integers");
  return mx::astype(input, wanted, stream);
}

Arrays apply(const std::shared_ptr<const Operation>& operation, Arrays in) {
  require(in.size() >= operation->least && in.size() <= operation->most,
          "another number of inputs");
  mx::Stream stream = cpu_stream();
  mx::Dtype kind = operation->as_input() ? in[0].dtype() : mx::float32;
  for (size_t i = 0; i < in.size(); i++) in[i] = converted(in[i], operation->dtype(i), stream);
  in.insert(in.end(), operation->constants.begin(), operation->constants.end());
  std::vector<mx::Shape> shapes = operation->shapes(in);
  auto primitive = std::make_shared<Applied>(stream, operation);
  Arrays out;
  if (shapes.size() == 1) {
    out.push_back(mx::array(shapes[0], mx::float32, std::move(primitive), std::move(in)));
  } else {
    std::vector<mx::Dtype> dtypes(shapes.size(), mx::float32);
    out = mx::array::make_arrays(std::move(shapes), dtypes, primitive, in);
  }
  if (kind != mx::float32) {
    for (mx::array& output : out) output = mx::astype(output, kind, stream);
  }
  return out;
}

}  // namespace
