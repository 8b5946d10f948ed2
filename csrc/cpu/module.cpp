// fiun_fast._cpu: addresses and sizes in. No torch headers, so that one build serves every torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "homes.h"
#include "pool.h"
#include "run.h"

namespace py = pybind11;
using namespace fiun;

namespace {

const Kernels& choose(const std::string& isa) {
    static const std::vector<const Kernels*> usable = usable_kernels();
    if (isa.empty()) return *usable.front();
    std::string names;
    for (const Kernels* kernels : usable) {
        if (isa == kernels->isa) return *kernels;
        names += names.empty() ? kernels->isa : std::string(", ") + kernels->isa;
    }
    throw std::invalid_argument("instruction set '" + isa + "' is not usable here; usable: " + names);
}

py::list names(const std::vector<const Kernels*>& list) {
    py::list names;
    for (const Kernels* kernels : list) names.append(kernels->isa);
    return names;
}

template <class T>
T* at(int64_t address) {
    return reinterpret_cast<T*>(address);
}

std::unique_ptr<DampenLaunch> prepare_dampen(int64_t rows, int64_t row_count, int64_t sources, int64_t gradients,
                                             int64_t weights, int64_t targets, int fisher_kind, int merge, double scale,
                                             int theta_kind, int64_t alpha, int64_t lam, double exponent, double cap,
                                             int threads) {
    const Table table{at<int64_t>(rows),   row_count,            at<int64_t>(sources), at<int64_t>(gradients),
                      at<double>(weights), at<int64_t>(targets), fisher_kind};
    const Limits limits{theta_kind, at<double>(alpha), at<double>(lam), exponent, cap};
    const py::gil_scoped_release free_gil;  // not around py::init, which writes to tables of pybind11
    return std::make_unique<DampenLaunch>(table, Merging{merge, scale}, limits, threads);
}

void run_prepared(const DampenLaunch& launch, int64_t counts, bool dry_run, const std::string& isa) {
    launch.run(choose(isa), at<int64_t>(counts), !dry_run);
}

void merge(int64_t sources, int64_t weights, int64_t count, int64_t out, int64_t n, int fisher_kind, int how,
           double scale, int threads, const std::string& isa) {
    run_merge(choose(isa), fisher_kind, at<int64_t>(sources), at<double>(weights), count, how, scale, out, n, threads);
}

void accumulate(int64_t pairs, int64_t pair_count, bool square, bool zero, int threads, const std::string& isa) {
    run_accumulate(choose(isa), at<int64_t>(pairs), pair_count, square, zero, threads);
}

void histogram(int64_t rows, int64_t row_count, int64_t sources, int64_t gradients, int64_t weights, int64_t targets,
               int fisher_kind, int merge, double scale, int theta_kind, int64_t bases, int low, bool nearest,
               int64_t counts, int threads, const std::string& isa) {
    const Table table{at<int64_t>(rows),   row_count,            at<int64_t>(sources), at<int64_t>(gradients),
                      at<double>(weights), at<int64_t>(targets), fisher_kind};
    run_histogram(choose(isa), table, Merging{merge, scale}, theta_kind, at<int64_t>(bases), low, nearest,
                  at<int64_t>(counts), threads);
}

void outer_square(int64_t left, int64_t right, int64_t into, int64_t samples, int64_t positions, int64_t m, int64_t k,
                  int64_t left_sample, int64_t left_step, int64_t right_sample, int64_t right_step, int threads,
                  const std::string& isa) {
    const OuterSquare work{at<float>(left), at<float>(right), at<float>(into), samples,      positions, m, k,
                           left_sample,     left_step,        right_sample,    right_step};
    run_outer_square(choose(isa), work, threads);
}

void add_squares(int64_t into, int64_t products, int64_t rows, int64_t n, int fisher_kind, int threads,
                 const std::string& isa) {
    run_add_squares(choose(isa), fisher_kind, into, products, rows, n, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, module, py::mod_gil_not_used()) {
    using py::arg;
    const auto free_gil = py::call_guard<py::gil_scoped_release>();
    module.def("isa", [](const std::string& isa) { return choose(isa).isa; }, arg("isa") = "");
    module.def("usable_isas", [] { return names(usable_kernels()); });
    module.def("compiled_isas", [] { return names(compiled_kernels()); });
    module.def("use_openmp", &use_openmp, arg("parallel"), arg("thread_number"));
    module.def("expect_writes", &expect_writes, arg("address"), arg("bytes"));
    py::class_<DampenLaunch>(module, "DampenLaunch")
        .def(py::init(&prepare_dampen), arg("rows"), arg("row_count"), arg("sources"), arg("gradients"),
             arg("weights"), arg("targets"), arg("fisher_kind"), arg("merge"), arg("scale"), arg("theta_kind"), arg("alpha"), arg("lam"),
             arg("exponent"), arg("cap"), arg("threads"))
        .def("run", &run_prepared, free_gil, arg("counts"), arg("dry_run"), arg("isa") = "")
        .def_property_readonly("threads", &DampenLaunch::threads);
    module.def("merge", &merge, free_gil, arg("sources"), arg("weights"), arg("count"), arg("out"), arg("n"),
               arg("fisher_kind"), arg("how"), arg("scale"), arg("threads"), arg("isa") = "");
    module.def("histogram", &histogram, free_gil, arg("rows"), arg("row_count"), arg("sources"), arg("gradients"),
               arg("weights"), arg("targets"), arg("fisher_kind"), arg("merge"), arg("scale"), arg("theta_kind"),
               arg("bases"), arg("low"), arg("nearest"), arg("counts"), arg("threads"), arg("isa") = "");
    module.def("accumulate", &accumulate, free_gil, arg("pairs"), arg("pair_count"), arg("square"), arg("zero"),
               arg("threads"), arg("isa") = "");
    module.def("outer_square", &outer_square, free_gil, arg("left"), arg("right"), arg("into"), arg("samples"),
               arg("positions"), arg("m"), arg("k"), arg("left_sample"), arg("left_step"), arg("right_sample"),
               arg("right_step"), arg("threads"), arg("isa") = "");
    module.def("add_squares", &add_squares, free_gil, arg("into"), arg("products"), arg("rows"), arg("n"),
               arg("fisher_kind"), arg("threads"), arg("isa") = "");
    module.def("all_held", &all_held, arg("mappings"), arg("keys"), arg("objects"));
    py::class_<Held>(module, "Held")
        .def(py::init<>())
        .def("all", &Held::all, arg("mappings"), arg("keys"), arg("objects"), arg("threads"))
        .def_static("number", [](const py::object& mapping) { return Held::number(mapping.ptr()); });
    py::class_<Places>(module, "Places")
        .def(py::init<const std::vector<int64_t>&>(), arg("functions"))
        .def("take", &Places::take, arg("tensors"))
        .def("unchanged", &Places::unchanged, arg("tensors"), arg("threads") = 1)
        .def("count_up", &Places::count_up, arg("tensors"), arg("function"), arg("threads"))
        .def("copy_from", &Places::copy_from, arg("tensors"), arg("element"))
        .def("fit", &Places::fit, arg("tensors"), arg("element"))
        .def("of", &Places::of, arg("tensor"));
}
