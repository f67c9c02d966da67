#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "step/program.h"

namespace trimtab {
namespace {

using Vector = std::optional<Array1<float>>;

Program::Floats floats(const Vector& v) {
  return v ? Program::Floats(v->data(), v->data() + v->shape(0)) : Program::Floats();
}

Slice or_none(const std::optional<Slice>& s) { return s.value_or(Slice{-1, 0, 0}); }

// A step; the outputs are a view of the program's memory.
nb::ndarray<nb::numpy, float, nb::ndim<2>> run(Program& program, Slice head, const Array1<int>& tokens,
                                              const Array1<int>& sequences, const Array1<int>& starts,
                                              const Array1<int>& counts, bool every,
                                              const std::vector<int>& adapters) {
  const size_t n = sequences.shape(0);
  require(n > 0 && starts.shape(0) == n && counts.shape(0) == n, "there is one start and one count for each sequence");
  program.check_output(head);
  std::vector<Segment> segments;
  for (size_t i = 0; i < n; ++i) segments.push_back({sequences.data()[i], starts.data()[i], counts.data()[i], 0});
  {
    nb::gil_scoped_release release;
    program.run(tokens.data(), static_cast<int>(tokens.shape(0)), segments, adapters, every);
  }
  const size_t shape[] = {program.step().picked.size(), static_cast<size_t>(head.width)};
  const int64_t strides[] = {program.stride(head), 1};
  return {program.at(head), 2, shape, nb::find(program), strides};
}

}  // namespace

void bind_step(nb::module_& module) {
  nb::class_<Slice>(module, "Slice", "Columns of one of a program's buffers.")
      .def_ro("width", &Slice::width)
      .def(
          "part",
          [](Slice s, int offset, int width) {
            require(offset >= 0 && width > 0 && offset <= s.width - width, "a part lies within its slice");
            return Slice{s.buffer, s.offset + offset, width};
          },
          nb::arg("offset"), nb::arg("width"), "Some of the columns.");
  nb::class_<Program>(module, "Program", "A model's forward as a list of operations that one team of threads runs.")
      .def(nb::init<int, int, int, int, bool>(), nb::arg("rows"), nb::arg("outputs"), nb::arg("sequences"), nb::arg("context"),
           nb::arg("paged") = false)
      .def_ro("rows", &Program::rows)
      .def_ro("outputs", &Program::outputs)
      .def_ro("sequences", &Program::sequences)
      .def_ro("context", &Program::context)
      .def_ro("paged", &Program::paged)
      .def_rw("timed", &Program::timed, "Whether the time of each operation is taken.")
      .def_prop_ro("nbytes", &Program::nbytes, "Bytes of buffers, scratch and caches.")
      .def_prop_ro("cache_bytes", &Program::cache_bytes, "Bytes of the caches alone.")
      .def_prop_ro("window", &Program::window, "Tokens that the caches pack together, across which no segment goes; 0: none.")
      .def("release", &Program::release, nb::arg("sequence"), nb::arg("first") = 0, nb::call_guard<nb::gil_scoped_release>(),
           "Let go of a sequence's tokens from `first` on; their memory goes back to the system where the caches are paged.")
      .def("profile", &Program::profile, "(operation, seconds) summed up over the steps that were timed.")
      .def("buffer", &Program::buffer, nb::arg("width"), nb::arg("picked") = false,
           "A row of floats for each token, or for each token whose outputs are asked for.")
      .def("cache", &Program::cache, nb::arg("heads"), nb::arg("size"), nb::arg("type") = "fp16", "A layer's keys and values.")
      .def("embed", &Program::embed, nb::arg("out"), nb::arg("table"), nb::arg("scale") = 1.0f)
      .def("place", &Program::place, nb::arg("x"), nb::arg("table"), nb::arg("offset") = 0)
      .def(
          "norm",
          [](Program& p, Slice x, const std::optional<Slice>& out, const std::optional<Slice>& add, bool rms,
             const Vector& weight, const Vector& bias, float eps, int groups) {
            p.norm(x, or_none(out), or_none(add), rms, floats(weight), floats(bias), eps, groups);
          },
          nb::arg("x"), nb::arg("out").none(), nb::arg("add").none() = nb::none(), nb::arg("rms") = true,
          nb::arg("weight").none() = nb::none(), nb::arg("bias").none() = nb::none(), nb::arg("eps") = 0.0f, nb::arg("groups") = 1,
          "x += add, then out = norm(x); without `out` only the addition.")
      .def(
          "linear",
          [](Program& p, Slice x, Slice out, std::shared_ptr<Weight> weight, const Vector& bias,
             const std::vector<std::pair<int, int>>& parts) {
            std::vector<Part> adapted;
            for (const auto& [place, offset] : parts) adapted.push_back({place, offset});
            p.linear(x, out, std::move(weight), floats(bias), std::move(adapted));
          },
          nb::arg("x"), nb::arg("out"), nb::arg("weight"), nb::arg("bias").none() = nb::none(),
          nb::arg("parts") = std::vector<std::pair<int, int>>(), "`parts` are (place of the adapters, first output).")
      .def(
          "adapt", [](Program& p, std::shared_ptr<Adapters> adapters) { p.adapt(std::move(adapters)); }, nb::arg("adapters"),
          "The adapters that linears with parts use.")
      .def("angles", &Program::angles, nb::arg("cosine"), nb::arg("sine"), "Angles of every position, [context, pairs].")
      .def("rotate", &Program::rotate, nb::arg("x"), nb::arg("heads"), nb::arg("angles"))
      .def("append", &Program::append, nb::arg("k"), nb::arg("v"), nb::arg("cache"))
      .def("attend", &Program::attend, nb::arg("q"), nb::arg("out"), nb::arg("cache"), nb::arg("scale"), nb::arg("window") = 0)
      .def(
          "activate",
          [](Program& p, const std::string& kind, Slice x, const std::optional<Slice>& times, Slice out) {
            p.activate(kind, x, or_none(times), out);
          },
          nb::arg("kind"), nb::arg("x"), nb::arg("times").none(), nb::arg("out"))
      .def("select", &Program::select, nb::arg("x"), nb::arg("out"))
      .def("run", &run, nb::arg("head"), nb::arg("tokens"), nb::arg("sequences"), nb::arg("starts"), nb::arg("counts"),
           nb::arg("every") = false, nb::arg("adapters") = std::vector<int>(),
           "One step: outputs [tokens asked for, width] of the slice `head`, a view that holds until the next step. Each "
           "sequence uses the adapter of its number, or none at -1.");
}

}  // namespace trimtab
