#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "base/arrays.h"
#include "codebook/codebook.h"

namespace trimtab {

void bind_codebook(nb::module_& module) {
  nb::class_<Codebook, Weight>(module, "Codebook", "A weight of indices into one or two codebooks.");
  module.def(
      "codebook",
      [](const std::vector<Array2<uint16_t>>& indices, const std::vector<Array2<Half>>& words, int cols) {
        require(!indices.empty() && indices.size() <= 2 && indices.size() == words.size(),
                "one or two codebooks were expected, each with its indices");
        const size_t rows = indices[0].shape(0), dim = words[0].shape(1);
        require(cols >= 1 && dim >= 1, "a weight has columns, and a codeword elements");
        std::vector<Codebook::Book> books;
        for (size_t b = 0; b < words.size(); ++b) {
          const size_t size = words[b].shape(0), vectors = (cols + dim - 1) / dim;
          require(words[b].shape(1) == dim && size <= 65536, "the codebooks differ in the length of their words");
          require(indices[b].shape(0) == rows && indices[b].shape(1) == vectors,
                  std::to_string(cols) + " columns need " + std::to_string(vectors) + " indices a row, not " +
                      std::to_string(indices[b].shape(1)));
          const uint16_t* first = indices[b].data();
          require(std::all_of(first, first + indices[b].size(), [&](uint16_t i) { return i < size; }),
                  "an index lies outside its codebook of " + std::to_string(size));
          books.push_back({first, words[b].data(), static_cast<int>(size)});
        }
        return std::make_shared<Codebook>(books, static_cast<int>(rows), cols, static_cast<int>(dim));
      },
      nb::arg("indices"), nb::arg("words"), nb::arg("cols"),
      "Indices [rows, ceil(cols / dim)] and words [size, dim] of one codebook, or of two that add up.");
}

}  // namespace trimtab
