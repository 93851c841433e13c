// The compiled module bev_reid._C. Each kernel file adds its functions here.
#include <pybind11/pybind11.h>

void bind_bev_pool(pybind11::module_& m);
void bind_buffers(pybind11::module_& m);
void bind_alignment(pybind11::module_& m);
void bind_occupancy(pybind11::module_& m);
void bind_ranking(pybind11::module_& m);

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of bev_reid; NumPy arrays in, results written into arrays given by the caller";
    bind_bev_pool(m);
    bind_buffers(m);
    bind_alignment(m);
    bind_occupancy(m);
    bind_ranking(m);
}
