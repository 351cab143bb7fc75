// The emulator as a Python module on numpy arrays: its controls, the device wrappers and its own
// tests. Without CUEMU the wrappers alone, for a GPU (tools/golden.py).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "wrappers.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

void check(int error) {
  if (error) throw std::runtime_error(wrapper_error(error));
}

template <typename T>
void require(const Array<T>& array, const char* name, py::ssize_t elements) {
  if (array.size() == elements) return;
  throw py::value_error(std::string(name) + " must have " + std::to_string(elements) +
                        " elements, got " + std::to_string(array.size()));
}

Array<uint32_t> ldmatrix(const Array<uint16_t>& rows, bool transposed) {
  require(rows, "rows", 32 * 8);
  Array<uint32_t> to({32, 4});
  check(wrapper_ldmatrix(rows.data(), transposed, to.mutable_data()));
  return to;
}

Array<float> mma(const Array<uint32_t>& a, const Array<uint32_t>& b, const Array<float>& c,
                 bool half) {
  require(a, "a", 32 * 4);
  require(b, "b", 32 * 2);
  require(c, "c", 32 * 4);
  Array<float> d({32, 4});
  std::copy_n(c.data(), 32 * 4, d.mutable_data());
  check(wrapper_mma(half, a.data(), b.data(), d.mutable_data()));
  return d;
}

Array<uint8_t> cp_async(const Array<uint8_t>& from, const Array<uint8_t>& valid) {
  require(from, "from", 2 * 32 * 16);
  require(valid, "valid", 2 * 32);
  Array<uint8_t> to({2, 32, 16});
  std::fill_n(to.mutable_data(), to.size(), 0xff);
  check(wrapper_cp_async(from.data(), valid.data(), to.mutable_data()));
  return to;
}

Array<float> exp2_of(const Array<float>& x) {
  Array<float> y(x.size());
  check(wrapper_exp2(x.data(), y.mutable_data(), static_cast<int>(x.size())));
  return y;
}

py::tuple wgmma(const Array<uint16_t>& a, const Array<uint16_t>& b, const py::object& a_registers,
                const Array<float>& c, bool half, int N, bool transposed, int columns,
                bool accumulate) {
  const int K = static_cast<int>(a.size() / 64), steps = K / 16;
  require(a, "a", 64 * 16 * steps);
  require(b, "b", N * K);
  require(c, "c", 64 * N);
  Array<float> d({128, N / 2});
  Array<uint8_t> b_shared(N * K * 2);
  std::copy_n(c.data(), 64 * N, d.mutable_data());
  std::fill_n(b_shared.mutable_data(), b_shared.size(), 0xff);
  Array<uint32_t> registers;
  if (!a_registers.is_none()) {
    registers = a_registers.cast<Array<uint32_t>>();
    require(registers, "a_registers", steps * 128 * 4);
  }
  check(wrapper_wgmma(half, N, transposed, columns, steps, accumulate, a.data(), b.data(),
                      a_registers.is_none() ? nullptr : registers.data(), d.mutable_data(),
                      b_shared.mutable_data()));
  return py::make_tuple(d, b_shared);
}

Array<uint8_t> tma(const Array<uint16_t>& data, int columns, int c, int l, int h, int b) {
  require(data, "data", 4 * 3 * 20 * 96);
  Array<uint8_t> out(16 * columns * 2);
  std::fill_n(out.mutable_data(), out.size(), 0xff);
  check(wrapper_tma(data.data(), columns, c, l, h, b, out.mutable_data()));
  return out;
}

}  // namespace

#ifdef CUEMU
extern "C" {
void cuemu_seed(int seed);
void cuemu_stats(unsigned long long* stats);
const char* cuemu_error();
void cuemu_register(const void* p, size_t bytes, int initialised, const char* name)
    __attribute__((weak));
void cuemu_unregister() __attribute__((weak));
const char* cuemu_perf_report() __attribute__((weak));

int selftest_checks(int* wrong);
int selftest_fault(const char* fault, int* out, int* parts, const int* in, unsigned* counter);
int selftest_functions(const void* operands, int count, uint64_t* exact, double* approximate,
                       int slots);
}

namespace {

py::dict stats() {
  unsigned long long counts[4];
  cuemu_stats(counts);
  py::dict names;
  const char* const keys[] = {"switches", "collectives", "blocks", "ptx_launches"};
  for (int i = 0; i < 4; ++i) names[keys[i]] = counts[i];
  return names;
}

void register_buffer(const py::buffer& array, bool initialised, const std::string& name) {
  const auto info = array.request();
  if (cuemu_register)
    cuemu_register(info.ptr, info.size * info.itemsize, initialised, name.c_str());
}

// The report of a planted fault; "" where none was found.
std::string fault(const std::string& name) {
  // With room behind: what writes past the end must not hurt the test.
  std::vector<int> out(96, -1), parts(192, -1), in(260, 7);
  std::vector<unsigned> counter(1, 0);  // not on the stack, where kernels' parameters lie
  if (cuemu_register) {
    cuemu_register(out.data(), 4 * 64, 0, "out");
    cuemu_register(parts.data(), 4 * parts.size(), 0, "parts");
    cuemu_register(in.data(), 4 * in.size(), 1, "in");
    cuemu_register(counter.data(), 4, 1, "counter");
  }
  const int error =
      selftest_fault(name.c_str(), out.data(), parts.data(), in.data(), counter.data());
  if (cuemu_unregister) cuemu_unregister();
  if (error == -1) throw py::value_error("no fault is called " + name);
  return error ? cuemu_error() : "";
}

int checks() {
  int wrong = 0;
  check(selftest_checks(&wrong));
  return wrong;
}

// operands: records laid out as Operands in selftest/functions.cu.
py::tuple functions(const py::buffer& operands, int slots) {
  const auto info = operands.request();
  Array<uint64_t> exact({info.size, py::ssize_t{slots}});
  Array<double> approximate({info.size, py::ssize_t{slots}});
  check(selftest_functions(info.ptr, static_cast<int>(info.size), exact.mutable_data(),
                           approximate.mutable_data(), slots));
  return py::make_tuple(exact, approximate);
}

}  // namespace
#endif

PYBIND11_MODULE(cuemu, m) {
  m.def("ldmatrix", &ldmatrix, py::arg("rows"), py::arg("transposed"));
  m.def("mma", &mma, py::arg("a"), py::arg("b"), py::arg("c"), py::arg("half"));
  m.def("cp_async", &cp_async, py::arg("from"), py::arg("valid"));
  m.def("exp2", &exp2_of, py::arg("x"));
  m.def("wgmma", &wgmma, py::arg("a"), py::arg("b"), py::arg("a_registers"), py::arg("c"),
        py::arg("half"), py::arg("N"), py::arg("transposed"), py::arg("columns"),
        py::arg("accumulate"));
  m.def("tma", &tma, py::arg("data"), py::arg("columns"), py::arg("c"), py::arg("l"), py::arg("h"),
        py::arg("b"));
#ifdef CUEMU
  m.def("seed", &cuemu_seed, "Random order of threads and blocks; 0: one after the other.");
  m.def("stats", &stats);
  m.def("last_error", [] { return std::string(cuemu_error()); });
  m.def("perf_report", [] { return std::string(cuemu_perf_report ? cuemu_perf_report() : ""); });
  m.def("register", &register_buffer, py::arg("array"), py::arg("initialised"), py::arg("name"));
  m.def("unregister", [] {
    if (cuemu_unregister) cuemu_unregister();
  });
  m.def("checks", &checks);
  m.def("fault", &fault, py::arg("name"));
  m.def("functions", &functions, py::arg("operands"), py::arg("slots"));
#endif
}
