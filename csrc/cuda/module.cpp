// fiun_fast._cuda: addresses, sizes and a stream in, nothing out. No torch headers, so that one build serves every torch;
// nothing here touches the driver before a function is called, so that it imports where there is none.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "run.h"

#ifndef FIUN_CUDA_ARCHS
#define FIUN_CUDA_ARCHS ""
#endif
#ifndef FIUN_CUDA_MODULE
#define FIUN_CUDA_MODULE _cuda
#endif

namespace py = pybind11;
using namespace fiun;

namespace {

template <class T>
T* at(int64_t address) {
    return reinterpret_cast<T*>(address);
}

void dampen(int device, int64_t tiles, int64_t tile_count, int64_t sources, int64_t gradients, int64_t weights,
            int64_t targets, int64_t limits, int64_t counts, int theta_kind, int fisher_kind, int merge, double scale,
            double exponent, double cap, bool dry_run, int64_t stream) {
    const DampenArgs args{at<Tile>(tiles),  tile_count,          at<int64_t>(sources), at<int64_t>(gradients),
                          at<void>(weights), at<Target>(targets), at<void>(limits),     at<int64_t>(counts),
                          scale,            exponent,            cap,                  merge,
                          !dry_run};
    run_dampen(device, theta_kind, fisher_kind, args, stream);
}

void histogram(int device, int64_t tiles, int64_t runs, int64_t run_count, int64_t sources, int64_t gradients,
               int64_t weights, int64_t targets, int64_t bases, int64_t counts, int theta_kind, int fisher_kind,
               int merge, double scale, int low, bool nearest, int64_t stream) {
    const HistogramArgs args{at<Tile>(tiles),        at<int64_t>(runs),  run_count,           at<int64_t>(sources),
                             at<int64_t>(gradients), at<void>(weights),  at<Target>(targets), at<int64_t>(bases),
                             at<int64_t>(counts),    scale,              merge,               low,
                             nearest};
    run_histogram(device, theta_kind, fisher_kind, args, stream);
}

void merge(int device, int64_t sources, int64_t weights, int64_t count, int64_t out, int64_t n, int fisher_kind, int how,
           double scale, int64_t stream) {
    run_merge(device, fisher_kind, at<int64_t>(sources), at<double>(weights), count, how, scale, out, n, stream);
}

void accumulate(int device, int64_t pairs, int64_t pair_count, bool square, bool zero, int64_t stream) {
    run_accumulate(device, at<int64_t>(pairs), pair_count, square, zero, stream);
}

void add_squares(int device, int64_t into, int64_t products, int64_t rows, int64_t n, int fisher_kind, int64_t stream) {
    run_add_squares(device, fisher_kind, into, products, rows, n, stream);
}

}  // namespace

PYBIND11_MODULE(FIUN_CUDA_MODULE, module, py::mod_gil_not_used()) {
    using py::arg;
    const auto free_gil = py::call_guard<py::gil_scoped_release>();
    module.attr("architectures") = FIUN_CUDA_ARCHS;  // as "80,90,90+PTX"
    module.attr("toolkit_version") = toolkit_version();
    module.attr("tile_bytes") = sizeof(Tile);
    module.attr("tile_targets") = warp_threads;
    module.def("driver_version", &driver_version);
    module.def("capabilities", &capabilities);
    module.def("tile_shape", [](int theta_kind, int fisher_kind) {
        const TileShape shape = tile_shape(theta_kind, fisher_kind);
        return py::make_tuple(shape.unit, shape.step);
    }, arg("theta_kind"), arg("fisher_kind"));
    module.def("resident_warps", &resident_warps, free_gil, arg("device"), arg("theta_kind"), arg("fisher_kind"),
               arg("with_exponent"), arg("with_sign"));
    module.def("dampen", &dampen, free_gil, arg("device"), arg("tiles"), arg("tile_count"), arg("sources"),
               arg("gradients"), arg("weights"), arg("targets"), arg("limits"), arg("counts"), arg("theta_kind"),
               arg("fisher_kind"), arg("merge"), arg("scale"), arg("exponent"), arg("cap"), arg("dry_run"),
               arg("stream"));
    module.def("histogram_warps", &histogram_warps, free_gil, arg("device"), arg("theta_kind"), arg("fisher_kind"),
               arg("with_sign"));
    module.def("histogram", &histogram, free_gil, arg("device"), arg("tiles"), arg("runs"), arg("run_count"),
               arg("sources"), arg("gradients"), arg("weights"), arg("targets"), arg("bases"), arg("counts"),
               arg("theta_kind"), arg("fisher_kind"), arg("merge"), arg("scale"), arg("low"), arg("nearest"),
               arg("stream"));
    module.def("merge", &merge, free_gil, arg("device"), arg("sources"), arg("weights"), arg("count"), arg("out"),
               arg("n"), arg("fisher_kind"), arg("how"), arg("scale"), arg("stream"));
    module.def("accumulate", &accumulate, free_gil, arg("device"), arg("pairs"), arg("pair_count"), arg("square"),
               arg("zero"), arg("stream"));
    module.def("add_squares", &add_squares, free_gil, arg("device"), arg("into"), arg("products"), arg("rows"), arg("n"),
               arg("fisher_kind"), arg("stream"));
}
