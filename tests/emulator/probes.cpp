#include "probes.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace latent_rl {

void bind_probes_cuda(pybind11::module_& m) {
  m.def("probe", [](const std::string& name, uintptr_t out) {
    cuda::probe(name, reinterpret_cast<float*>(out));
  });
}

}  // namespace latent_rl
