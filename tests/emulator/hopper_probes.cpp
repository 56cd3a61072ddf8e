#include "hopper_probes.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace latent_rl {

void bind_hopper_probes_cuda(pybind11::module_& m) {
  m.def("hopper_probe", [](const std::string& fault, uintptr_t left, uintptr_t right, uintptr_t out,
                           int64_t rows, int64_t width) {
    cuda::hopper_probe(fault, reinterpret_cast<const void*>(left),
                       reinterpret_cast<const void*>(right), reinterpret_cast<float*>(out), rows,
                       width);
  });
}

}  // namespace latent_rl
