// restore_ext._C: importing it loads this library, and loading it registers the operators.
// It carries facts about the build, and the profiler's ranges; tensors travel through the
// dispatcher.
#include <Python.h>

#include "cpu/kernels.h"
#include "nvtx.h"

static PyObject* range_push(PyObject*, PyObject* name) {
  const char* text = PyUnicode_AsUTF8AndSize(name, nullptr);
  if (text == nullptr) return nullptr;
  restore_ext::nvtx::push(text);
  Py_RETURN_NONE;
}

static PyObject* range_pop(PyObject*, PyObject*) {
  restore_ext::nvtx::pop();
  Py_RETURN_NONE;
}

static PyMethodDef functions[] = {{"range_push", range_push, METH_O, nullptr},
                                  {"range_pop", range_pop, METH_NOARGS, nullptr},
                                  {nullptr, nullptr, 0, nullptr}};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, 0, functions, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  if (PyModule_AddStringConstant(module, "compiler", __VERSION__) < 0 ||
      PyModule_AddStringConstant(module, "torch_target", RESTORE_EXT_TORCH_TARGET) < 0 ||
      PyModule_AddStringConstant(module, "cpu_levels", restore_ext::cpu::levels()) < 0 ||
      PyModule_AddStringConstant(module, "cuda_archs", RESTORE_EXT_CUDA_ARCHS) < 0 ||
      PyModule_AddIntConstant(module, "nvtx", restore_ext::nvtx::built_in()) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
