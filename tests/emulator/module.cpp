// A module with the CUDA bindings of some rooms of kernels/, running on the emulator.
#include <pybind11/pybind11.h>

#include "checks.h"
#include "runtime.h"

namespace latent_rl {
#define BIND(part) void bind_##part##_cuda(pybind11::module_& m);
LATENT_RL_EMULATED_PARTS
#undef BIND
}  // namespace latent_rl

PYBIND11_MODULE(LATENT_RL_EMULATED_NAME, m) {
  pybind11::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const latent_rl::DTypeError& e) {
      PyErr_SetString(PyExc_TypeError, e.what());
    }
  });
  m.attr("has_cuda") = true;
  m.def("set_order", [](int order, unsigned seed) {
    emulator::set_order(static_cast<emulator::Order>(order), seed);
  });
#define BIND(part) latent_rl::bind_##part##_cuda(m);
  LATENT_RL_EMULATED_PARTS
#undef BIND
}
