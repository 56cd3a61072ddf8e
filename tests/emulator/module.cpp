// A module with the CUDA bindings of one op, running on the emulator.
#include <pybind11/pybind11.h>

#include "checks.h"
#include "runtime.h"

namespace latent_rl {
void LATENT_RL_EMULATED_BIND(pybind11::module_& m);
}

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
  latent_rl::LATENT_RL_EMULATED_BIND(m);
}
