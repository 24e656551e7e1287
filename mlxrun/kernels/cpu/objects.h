// MLX's arrays as Python objects, without Python's or nanobind's headers: of an array this knows
// where nanobind puts the C++ object (`array_of`), which native.py checks before it relies on it,
// and of Python a few functions of the stable ABI.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "mlx/array.h"

namespace mx = mlx::core;

// Of Python's stable ABI.
struct PyObject;
extern "C" {
ptrdiff_t PyTuple_Size(PyObject*);
PyObject* PyTuple_GetItem(PyObject*, ptrdiff_t);
PyObject* PyList_New(ptrdiff_t);
int PyList_SetItem(PyObject*, ptrdiff_t, PyObject*);
PyObject* PyObject_CallObject(PyObject*, PyObject*);
void PyErr_SetString(PyObject*, const char*);
void Py_DecRef(PyObject*);
extern PyObject* PyExc_TypeError;
extern PyObject* PyExc_ValueError;
extern PyObject* PyExc_RuntimeError;
extern PyObject* PyExc_OSError;
}

namespace {

struct NotAnArray : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// How arrays look from outside: set by `glue_start`.
struct Layout {
  ptrdiff_t header = 0;        // bytes of PyObject
  PyObject* type = nullptr;    // mx.array
  PyObject* none = nullptr;
  PyObject* create = nullptr;  // makes an array object, to be assigned to
} layout;

// A nanobind instance has the offset of its C++ object in 32 bits after Python's header; the object
// follows these and 32 bits of flags. The type is the last word of the header, in free-threaded
// builds of Python, too.
mx::array& array_of(PyObject* object) {
  char* start = reinterpret_cast<char*>(object);
  PyObject* type;
  std::memcpy(&type, start + layout.header - sizeof type, sizeof type);
  if (type != layout.type) throw NotAnArray("an mx.array is needed");
  int32_t offset;
  std::memcpy(&offset, start + layout.header, sizeof offset);
  if (offset != layout.header + 8) throw NotAnArray("an array that lies in another object");
  return *reinterpret_cast<mx::array*>(start + offset);
}

PyObject* object_of(mx::array made) {
  PyObject* object = PyObject_CallObject(layout.create, nullptr);
  if (object) array_of(object) = std::move(made);
  return object;
}

// Runs a function that makes a Python object; C++ exceptions become Python's.
template <class Function>
PyObject* guarded(Function function) {
  try {
    return function();
  } catch (const NotAnArray& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::system_error& error) {
    PyErr_SetString(PyExc_OSError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

void require(bool met, const char* otherwise) {
  if (!met) throw std::invalid_argument(otherwise);
}

}  // namespace
