// A model's forward as a list of operations that one team runs from end to end: no Python, no allocation and no check in
// between, for everything was checked when the list was made.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "base/arrays.h"
#include "linear/weight.h"
#include "lowrank/adapters.h"

namespace trimtab {

// Columns [offset, offset + width) of a buffer; a buffer has a row for each token of a step, or for each token whose
// outputs are asked for (`picked`).
struct Slice {
  int buffer, offset, width;
};

// What the operations of one step share.
struct Step {
  int rows = 0;                          // tokens
  std::vector<int> token, sequence, position;  // of each row
  std::vector<int> picked;               // rows whose outputs are asked for
  std::vector<Segment> segments;
  std::vector<Rows> adapted;             // rows that use an adapter
  std::map<std::pair<int, int>, Pieces> pieces;  // (query heads, heads) -> how attention is divided
  std::byte* scratch = nullptr;          // of the team
  std::byte* own = nullptr;              // of each thread, `own_bytes` apart
  size_t own_bytes = 0;
};

// Cosines and sines by which pairs of channels turn, [position][pair].
struct Angles {
  int positions, pairs;
  std::vector<float> cosine, sine;
};

class Program;

// Every thread of the team calls `run`; when it returns, what it wrote is complete for all of them.
class Operation {
 public:
  explicit Operation(std::string name) : name(std::move(name)) {}
  virtual ~Operation() = default;
  virtual void run(const Program& program, const Step& step, const Team& team) const = 0;
  virtual size_t scratch(const Program& program) const { return (void)program, 0; }
  virtual size_t own_scratch() const { return 0; }
  const std::string name;
  mutable double seconds = 0;  // spent so far, as the first thread sees it
};

class Program {
 public:
  // rows: tokens that a step takes at most; outputs: tokens whose outputs it gives at most; sequences, context: of the caches;
  // paged: which take memory for the tokens that they hold, and give it back by `release`.
  Program(int rows, int outputs, int sequences, int context, bool paged);

  Slice buffer(int width, bool picked);
  int cache(int heads, int size, const std::string& type);

  using Floats = std::vector<float>;
  using Shared = std::shared_ptr<const Weight>;
  void embed(Slice out, Shared table, float scale);
  void place(Slice x, Shared table, int offset);
  void norm(Slice x, Slice out, Slice add, bool rms, Floats weight, Floats bias, float eps, int groups);
  void linear(Slice x, Slice out, Shared weight, Floats bias, std::vector<Part> parts);
  // The adapters that linears with parts use; before the first of them.
  void adapt(std::shared_ptr<const Adapters> adapters);
  int angles(const Array2<float>& cosine, const Array2<float>& sine);
  void rotate(Slice x, int heads, int angles);
  void append(Slice k, Slice v, int cache);
  void attend(Slice q, Slice out, int cache, float scale, int window);
  void activate(const std::string& kind, Slice x, Slice times, Slice out);
  void select(Slice x, Slice out);

  // One step: tokens of the segments, one segment after the other; the outputs of the last token of each are asked for, or of
  // `every` token. Each segment uses the adapter of its number, or none at -1; no numbers: none does.
  void run(const int* tokens, int rows, const std::vector<Segment>& segments, const std::vector<int>& numbers, bool every);

  // The caches let go of a sequence's tokens from `first` on.
  void release(int sequence, int first);

  float* at(Slice s) const { return reinterpret_cast<float*>(arena_.data()) + starts_[s.buffer] + s.offset; }
  int stride(Slice s) const { return widths_[s.buffer]; }
  bool picked(Slice s) const { return is_picked_[s.buffer]; }
  int count(Slice s, const Step& step) const { return picked(s) ? static_cast<int>(step.picked.size()) : step.rows; }
  const Angles& angles_at(int i) const { return angles_[i]; }
  const Step& step() const { return step_; }
  const Adapters* adapters() const { return adapters_.get(); }

  void check_output(Slice s) const;  // refuse a slice that holds no outputs
  size_t nbytes() const;  // of buffers, scratch and caches, once it has run
  size_t cache_bytes() const;
  int window() const { return caches_.empty() ? 0 : caches_[0]->format.window; }  // tokens that caches pack together; 0: none
  std::vector<std::pair<std::string, double>> profile() const;

  const int rows, outputs, sequences, context;
  const bool paged;
  bool timed = false;

 private:
  void finish();  // allocate what the operations need
  void add(std::unique_ptr<Operation> operation);
  void check(Slice s, const char* what) const;  // refuse a slice that is not within its buffer
  void check_pair(Slice a, Slice b, const std::string& what) const;

  std::vector<std::unique_ptr<Operation>> operations_;
  std::vector<std::unique_ptr<Cache>> caches_;
  std::vector<Angles> angles_;
  std::vector<int> widths_;
  std::vector<bool> is_picked_;
  std::vector<size_t> starts_;
  std::vector<int> vocabularies_;  // rows of the tables that tokens index
  std::vector<int> places_;        // positions that the tables of positions hold
  std::map<std::pair<int, int>, int> attentions_;  // (query heads, heads) -> the widest padded head
  std::shared_ptr<const Adapters> adapters_;
  Buffer arena_, scratch_;
  size_t floats_ = 0, own_bytes_ = 0, linear_scratch_ = 0;
  int scratch_threads_ = 0;  // that linear_scratch_ was counted for
  bool finished_ = false;
  Step step_;
  std::mutex running_;
};

}  // namespace trimtab
