#include "bindings.h"

namespace py = pybind11;

namespace fastldm {
namespace {

using Strides = std::tuple<Address, int64_t, int64_t, int64_t>;  // address, slot, channel, pixel

Plane plane(const Strides& strides) {
    const auto& [address, slot, channel, pixel] = strides;
    return {pointer<void>(address), slot, channel, pixel};
}

void guided_step(const std::string& isa, Strides latents, Strides x0, Strides model_input, Strides out,
                 std::optional<Strides> noise, const std::string& type, int64_t slots, int64_t channels, int64_t pixels,
                 int64_t copies, bool guided, Address table, int64_t table_slot, int64_t table_rows, int64_t columns,
                 Address step, int threads) {
    require(slots > 0 && channels > 0 && pixels > 0, "slots, channels and pixels are positive");
    require(copies == 1 || copies == 2, "copies are 1 or 2");
    require(columns >= 9, "a sampler table has at least nine columns");
    require(threads > 0, "threads are positive");
    const Kernels& kernels = kernels_of(isa);
    const Type element = parse_type(type);
    const auto* rows = pointer<const int64_t>(step);
    for (int64_t slot = 0; slot < slots; ++slot)
        if (rows[slot] < 0 || rows[slot] >= table_rows)
            throw std::out_of_range("step " + std::to_string(rows[slot]) + " of a sampler table with " +
                                    std::to_string(table_rows) + " rows");

    GuidedStep a{};
    a.latents = plane(latents);
    a.x0 = plane(x0);
    a.model_input = plane(model_input);
    a.out = plane(out);
    if (noise) a.noise = plane(*noise);
    a.table = pointer<const float>(table);
    a.step = rows;
    a.slots = slots, a.channels = channels, a.pixels = pixels;
    a.table_slot = table_slot, a.columns = columns;
    a.copies = copies;
    a.guided = guided;
    a.type = element;
    a.threads = threads;
    kernels.guided_step(a);
}

}  // namespace

void bind_guided_step(py::module_& module) {
    using py::arg;
    module.def("guided_step", &guided_step, py::call_guard<py::gil_scoped_release>(), arg("isa"), arg("latents"),
               arg("x0"), arg("model_input"), arg("out"), arg("noise"), arg("type"), arg("slots"), arg("channels"),
               arg("pixels"), arg("copies"), arg("guided"), arg("table"), arg("table_slot"), arg("table_rows"),
               arg("columns"), arg("step"), arg("threads"),
               "One row of each slot's sampler table, in place; a tensor is (address, slot, channel, pixel strides).");
}

}  // namespace fastldm
