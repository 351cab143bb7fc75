// restore_ext._C: importing it loads this library, and loading it registers the operators.
// It carries only facts about the build; tensors travel through the dispatcher.
#include <Python.h>

#ifndef RESTORE_EXT_CUDA_ARCHS
#define RESTORE_EXT_CUDA_ARCHS ""
#endif

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", NULL, 0, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__C(void) {
  PyObject* module = PyModule_Create(&definition);
  if (module == NULL) return NULL;
  if (PyModule_AddStringConstant(module, "compiler", __VERSION__) < 0 ||
      PyModule_AddStringConstant(module, "torch_target", RESTORE_EXT_TORCH_TARGET) < 0 ||
      PyModule_AddStringConstant(module, "cuda_archs", RESTORE_EXT_CUDA_ARCHS) < 0) {
    Py_DECREF(module);
    return NULL;
  }
  return module;
}
