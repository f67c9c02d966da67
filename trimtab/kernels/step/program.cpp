#include "step/program.h"

#include <algorithm>
#include <chrono>

#include "step/rows.h"

namespace trimtab {
namespace {

using Floats = Program::Floats;
using Shared = Program::Shared;

const float* data_or_null(const Floats& v) { return v.empty() ? nullptr : v.data(); }

// Divide rows of a width over the team, in pieces of whole cache lines: work(row, from, to).
template <typename Work>
void spread(const Team& team, int rows, int width, const Work& work) {
  constexpr int kStep = 256;
  const int steps = (width + kStep - 1) / kStep;
  const auto [first, last] = team.share(rows * steps);
  for (int i = first; i < last; ++i) work(i / steps, i % steps * kStep, std::min(width, (i % steps + 1) * kStep));
}

// Rows of the table of tokens, scaled.
class Embed final : public Operation {
 public:
  Embed(Slice out, Shared table, float scale) : Operation("embed"), out_(out), table_(std::move(table)), scale_(scale) {}
  void run(const Program& p, const Step& step, const Team& team) const override {
    const auto [first, last] = team.share(step.rows);
    for (int r = first; r < last; ++r) {
      float* to = p.at(out_) + size_t(r) * p.stride(out_);
      table_->row(step.token[r], to);
      if (scale_ != 1.0f)
        for (int c = 0; c < out_.width; ++c) to[c] *= scale_;
    }
    team.sync();
  }

 private:
  const Slice out_;
  const Shared table_;
  const float scale_;
};

// Adds the row of the table of positions.
class Place final : public Operation {
 public:
  Place(Slice x, Shared table, int offset) : Operation("embed"), x_(x), table_(std::move(table)), offset_(offset) {}
  size_t own_scratch() const override { return size_t(x_.width) * sizeof(float); }
  void run(const Program& p, const Step& step, const Team& team) const override {
    const auto [first, last] = team.share(step.rows);
    float* place = reinterpret_cast<float*>(step.own + team.rank * step.own_bytes);
    for (int r = first; r < last; ++r) {
      float* to = p.at(x_) + size_t(r) * p.stride(x_);
      table_->row(step.position[r] + offset_, place);
      for (int c = 0; c < x_.width; ++c) to[c] += place[c];
    }
    team.sync();
  }

 private:
  const Slice x_;
  const Shared table_;
  const int offset_;
};

// out = norm(x), in `groups` runs of channels of their own; with `add`, x += add first, in the same pass: the end of one
// branch and the start of the next.
class Norm final : public Operation {
 public:
  Norm(Slice x, Slice out, Slice add, bool rms, Floats weight, Floats bias, float eps, int groups)
      : Operation("norm"), x_(x), out_(out), add_(add), rms_(rms), weight_(std::move(weight)), bias_(std::move(bias)),
        eps_(eps), groups_(groups) {}
  void run(const Program& p, const Step& step, const Team& team) const override {
    const int width = x_.width / groups_;
    const auto [first, last] = team.share(p.count(x_, step) * groups_);
    for (int i = first; i < last; ++i) {
      const int r = i / groups_, c = i % groups_ * width;
      float* x = p.at(x_) + size_t(r) * p.stride(x_) + c;
      if (add_.buffer >= 0) {
        const float* add = p.at(add_) + size_t(r) * p.stride(add_) + c;
        for (int j = 0; j < width; ++j) x[j] += add[j];
      }
      if (out_.buffer >= 0)
        norm_row(x, p.at(out_) + size_t(r) * p.stride(out_) + c, width, rms_, data_or_null(weight_), data_or_null(bias_), eps_);
    }
    team.sync();
  }

 private:
  const Slice x_, out_, add_;
  const bool rms_;
  const Floats weight_, bias_;
  const float eps_;
  const int groups_;
};

// out = W x + bias, and for rows with an adapter its corrections.
class Linear final : public Operation {
 public:
  Linear(Slice x, Slice out, Shared weight, Floats bias, std::vector<Part> parts)
      : Operation("linear " + std::to_string(weight->rows) + "x" + std::to_string(weight->cols)), x_(x), out_(out),
        weight_(std::move(weight)), bias_(std::move(bias)), parts_(std::move(parts)) {}
  size_t scratch(const Program& p) const override {
    const int rows = p.picked(x_) ? p.outputs : p.rows;
    size_t most = 0;
    for (int m = 1; m <= rows; ++m) most = std::max(most, weight_->scratch(m));
    return inner_bytes(p, rows) + most;
  }
  void run(const Program& p, const Step& step, const Team& team) const override {
    const int rows = p.count(x_, step);
    if (rows == 0) return;
    const bool adapted = !parts_.empty() && !step.adapted.empty();
    float* inner = reinterpret_cast<float*>(step.scratch);
    std::byte* scratch = step.scratch + (adapted ? inner_bytes(p, rows) : 0);
    if (adapted) narrow_all(step.adapted, parts_, rows, p.adapters()->most, p.at(x_), p.stride(x_), inner, team);
    // When the weight returns, all threads have been there: the inner values are complete as well.
    weight_->apply(p.at(x_), p.stride(x_), rows, p.at(out_), p.stride(out_), scratch, team);
    if (adapted) {
      widen_all(step.adapted, parts_, rows, p.adapters()->most, inner, p.at(out_), p.stride(out_), team);
      team.sync();
    }
    if (bias_.empty()) return;
    spread(team, rows, out_.width, [&](int r, int from, int to) {
      float* y = p.at(out_) + size_t(r) * p.stride(out_);
      for (int c = from; c < to; ++c) y[c] += bias_[c];
    });
    team.sync();
  }

 private:
  size_t inner_bytes(const Program& p, int rows) const {
    return parts_.empty() ? 0 : whole_lines(adapted_scratch(*p.adapters(), parts_.size(), rows) * sizeof(float));
  }

  const Slice x_, out_;
  const Shared weight_;
  const Floats bias_;
  const std::vector<Part> parts_;
};

// Turns each head by the angles of its position.
class Rotate final : public Operation {
 public:
  Rotate(Slice x, int heads, int angles) : Operation("rotate"), x_(x), heads_(heads), angles_(angles) {}
  void run(const Program& p, const Step& step, const Team& team) const override {
    const Angles& angles = p.angles_at(angles_);
    const auto [first, last] = team.share(step.rows * heads_);
    for (int i = first; i < last; ++i) {
      const int r = i / heads_;
      const size_t at = size_t(step.position[r]) * angles.pairs;
      rotate_head(p.at(x_) + size_t(r) * p.stride(x_) + i % heads_ * (x_.width / heads_), 2 * angles.pairs, &angles.cosine[at],
                  &angles.sine[at]);
    }
    team.sync();
  }

 private:
  const Slice x_;
  const int heads_, angles_;
};

// Puts the new keys and values into the cache.
class Append final : public Operation {
 public:
  Append(Slice k, Slice v, Cache& cache) : Operation("append"), k_(k), v_(v), cache_(cache) {}
  void run(const Program& p, const Step& step, const Team& team) const override {
    Cache& cache = cache_;
    if (cache.format.bits > 0) {
      const auto [first, last] = team.share(cache.heads * static_cast<int>(step.segments.size()));
      for (int i = first; i < last; ++i) {
        const Segment& s = step.segments[i / cache.heads];
        cache.turn(s.sequence, i % cache.heads, s.start);
      }
      team.sync();
      if (team.rank == 0)
        for (const Segment& s : step.segments) cache.turned(s.sequence, s.start);
    }
    // By heads first: tokens of a head lie side by side, and no two threads write to one line.
    const auto [first, last] = team.share(cache.heads * step.rows);
    cache.with_type([&]<typename T>(T*) {
      for (int i = first; i < last; ++i) {
        const int head = i / step.rows, r = i % step.rows, c = head * cache.size, position = step.position[r];
        cache.put<T>(step.sequence[r], head, position - cache.first(position), p.at(k_) + size_t(r) * p.stride(k_) + c,
                     p.at(v_) + size_t(r) * p.stride(v_) + c);
      }
    });
    team.sync();
  }

 private:
  const Slice k_, v_;
  Cache& cache_;
};

class Attend final : public Operation {
 public:
  Attend(Slice q, Slice out, Attention attention) : Operation("attention"), q_(q), out_(out), attention_(attention) {}
  size_t own_scratch() const override { return attention_.scratch(); }
  void run(const Program& p, const Step& step, const Team& team) const override {
    const Pieces& pieces = step.pieces.at({attention_.query_heads, attention_.cache.heads});
    attention_.run(pieces, p.at(q_), p.stride(q_), p.at(out_), p.stride(out_), step.scratch,
                   step.own + team.rank * step.own_bytes, team);
  }

 private:
  const Slice q_, out_;
  const Attention attention_;
};

class Activate final : public Operation {
 public:
  Activate(Activation kind, Slice x, Slice times, Slice out)
      : Operation("activation"), kind_(kind), x_(x), times_(times), out_(out) {}
  void run(const Program& p, const Step& step, const Team& team) const override {
    spread(team, p.count(x_, step), x_.width, [&](int r, int from, int to) {
      const float* times = times_.buffer < 0 ? nullptr : p.at(times_) + size_t(r) * p.stride(times_) + from;
      activate_row(kind_, p.at(x_) + size_t(r) * p.stride(x_) + from, times, p.at(out_) + size_t(r) * p.stride(out_) + from, to - from);
    });
    team.sync();
  }

 private:
  const Activation kind_;
  const Slice x_, times_, out_;
};

// Keeps the rows whose outputs are asked for.
class Select final : public Operation {
 public:
  Select(Slice x, Slice out) : Operation("select"), x_(x), out_(out) {}
  void run(const Program& p, const Step& step, const Team& team) const override {
    const auto [first, last] = team.share(static_cast<int>(step.picked.size()));
    for (int i = first; i < last; ++i)
      std::copy_n(p.at(x_) + size_t(step.picked[i]) * p.stride(x_), x_.width, p.at(out_) + size_t(i) * p.stride(out_));
    team.sync();
  }

 private:
  const Slice x_, out_;
};

}  // namespace

Program::Program(int rows, int outputs, int sequences, int context, bool paged)
    : rows(rows), outputs(outputs), sequences(sequences), context(context), paged(paged) {
  require(rows > 0 && outputs > 0 && sequences > 0 && context > 0, "a program has at least one row, output, sequence and position");
  require(rows <= 1 << 16 && outputs <= 1 << 16 && sequences <= 1 << 16 && context <= 1 << 24, "a program is too large");
}

Slice Program::buffer(int width, bool picked) {
  require(width > 0 && width <= 1 << 24, "a buffer is between 1 and 2^24 wide, not " + std::to_string(width));
  require(!finished_, "the program has run; it takes no more buffers");
  const size_t stride = spaced(width);
  widths_.push_back(static_cast<int>(stride));
  is_picked_.push_back(picked);
  starts_.push_back(floats_);
  floats_ += stride * (picked ? outputs : rows);
  return {static_cast<int>(widths_.size()) - 1, 0, width};
}

int Program::cache(int heads, int size, const std::string& type) {
  require(heads > 0 && size > 0 && size <= 1024, "a cache has at least one head, of a size between 1 and 1024");
  const Format format = Format::parse(type);
  require(caches_.empty() || caches_[0]->format.window == format.window, "all caches of a program pack as many tokens together");
  caches_.push_back(std::make_unique<Cache>(sequences, context, heads, size, format, paged));
  return static_cast<int>(caches_.size()) - 1;
}

void Program::check(Slice s, const char* what) const {
  require(s.buffer >= 0 && s.buffer < static_cast<int>(widths_.size()) && s.offset >= 0 && s.width > 0 &&
              s.offset + s.width <= widths_[s.buffer],
          std::string(what) + " lies outside its buffer");
}

void Program::check_output(Slice s) const {
  check(s, "the output");
  require(picked(s), "the output is a buffer of outputs");
}

void Program::check_pair(Slice a, Slice b, const std::string& what) const {
  check(a, what.c_str());
  check(b, what.c_str());
  require(picked(a) == picked(b), what + ": both buffers hold a row for each token, or both for each output");
}

void Program::add(std::unique_ptr<Operation> operation) {
  require(!finished_, "the program has run; it takes no more operations");
  operations_.push_back(std::move(operation));
}

void Program::embed(Slice out, Shared table, float scale) {
  check(out, "the embedding");
  require(!picked(out) && table->cols == out.width, "an embedding of " + std::to_string(table->cols) + " channels goes into a slice of " + std::to_string(out.width));
  vocabularies_.push_back(table->rows);
  add(std::make_unique<Embed>(out, std::move(table), scale));
}

void Program::place(Slice x, Shared table, int offset) {
  check(x, "the position");
  require(!picked(x) && table->cols == x.width && offset >= 0, "a table of positions of " + std::to_string(table->cols) + " channels is added to a slice of " + std::to_string(x.width));
  places_.push_back(table->rows - offset);
  add(std::make_unique<Place>(x, std::move(table), offset));
}

void Program::norm(Slice x, Slice out, Slice plus, bool rms, Floats weight, Floats bias, float eps, int groups) {
  check(x, "the norm's input");
  require(out.buffer >= 0 || plus.buffer >= 0, "a norm writes somewhere, or adds something");
  if (out.buffer >= 0) check_pair(x, out, "a norm");
  if (plus.buffer >= 0) check_pair(x, plus, "an addition");
  require((out.buffer < 0 || out.width == x.width) && (plus.buffer < 0 || plus.width == x.width), "a norm keeps the width");
  require(groups > 0 && x.width % groups == 0, "a norm's groups divide its width");
  const size_t each = x.width / groups;
  require((weight.empty() || weight.size() == each) && (bias.empty() || bias.size() == each), "a norm over " + std::to_string(each) + " channels has as many weights");
  add(std::make_unique<Norm>(x, out, plus, rms, std::move(weight), std::move(bias), eps, groups));
}

void Program::adapt(std::shared_ptr<const Adapters> adapters) {
  require(adapters_ == nullptr && adapters != nullptr, "a program has one set of adapters");
  adapters_ = std::move(adapters);
}

void Program::linear(Slice x, Slice out, Shared weight, Floats bias, std::vector<Part> parts) {
  check_pair(x, out, "a linear");
  require(weight->cols == x.width && weight->rows == out.width,
          "a weight of " + std::to_string(weight->rows) + " x " + std::to_string(weight->cols) + " does not take " +
              std::to_string(x.width) + " channels to " + std::to_string(out.width));
  require(bias.empty() || bias.size() == size_t(out.width), "a bias has one value for each output");
  require(x.buffer != out.buffer || x.offset + x.width <= out.offset || out.offset + out.width <= x.offset, "a linear does not write over its input");
  require(parts.empty() || (adapters_ != nullptr && !picked(x)), "an adapted linear has a row for each token, in a program with adapters");
  for (const Part& part : parts) {
    require(part.place >= 0 && size_t(part.place) < adapters_->places.size(), "there is no place " + std::to_string(part.place) + " of adapters");
    const auto [rows, cols] = adapters_->places[part.place];
    require(cols == x.width && part.offset >= 0 && part.offset <= out.width - rows, "adapters of place " + std::to_string(part.place) + " do not fit the linear");
  }
  add(std::make_unique<Linear>(x, out, std::move(weight), std::move(bias), std::move(parts)));
}

int Program::angles(const Array2<float>& cosine, const Array2<float>& sine) {
  require(cosine.shape(0) >= size_t(context) && cosine.shape(1) > 0 && cosine.shape(1) <= 512,
          "angles are given for every position of the context, for 1 to 512 pairs of channels");
  require(sine.shape(0) == cosine.shape(0) && sine.shape(1) == cosine.shape(1), "cosines and sines have one shape");
  const size_t count = size_t(context) * cosine.shape(1);
  angles_.push_back({context, static_cast<int>(cosine.shape(1)), {cosine.data(), cosine.data() + count}, {sine.data(), sine.data() + count}});
  return static_cast<int>(angles_.size()) - 1;
}

void Program::rotate(Slice x, int heads, int angles) {
  check(x, "the rotated slice");
  require(!picked(x) && heads > 0 && x.width % heads == 0, "heads divide the rotated slice");
  require(angles >= 0 && angles < static_cast<int>(angles_.size()), "there are no such angles");
  require(2 * angles_[angles].pairs <= x.width / heads, "there are no more angles than pairs of channels");
  add(std::make_unique<Rotate>(x, heads, angles));
}

void Program::append(Slice k, Slice v, int index) {
  check_pair(k, v, "keys and values");
  require(index >= 0 && index < static_cast<int>(caches_.size()), "there is no such cache");
  const Cache& cache = *caches_[index];
  require(!picked(k) && k.width == cache.heads * cache.size && v.width == k.width, "keys and values have the width of the cache");
  add(std::make_unique<Append>(k, v, *caches_[index]));
}

void Program::attend(Slice q, Slice out, int index, float scale, int window) {
  check_pair(q, out, "attention");
  require(index >= 0 && index < static_cast<int>(caches_.size()), "there is no such cache");
  const Cache& cache = *caches_[index];
  require(!picked(q) && q.width == out.width && q.width % (cache.heads * cache.size) == 0, "query heads are a multiple of the cache's");
  require(window >= 0, "a window is a number of keys, or 0");
  const int heads = q.width / cache.size;
  int& widest = attentions_[{heads, cache.heads}];
  widest = std::max(widest, cache.padded);
  add(std::make_unique<Attend>(q, out, Attention{cache, heads, scale, window}));
}

void Program::activate(const std::string& kind, Slice x, Slice times, Slice out) {
  check_pair(x, out, "an activation");
  if (times.buffer >= 0) check_pair(x, times, "an activation");
  require(x.width == out.width && (times.buffer < 0 || times.width == x.width), "an activation keeps the width");
  add(std::make_unique<Activate>(parse_activation(kind), x, times, out));
}

void Program::select(Slice x, Slice out) {
  check(x, "the selection");
  check(out, "the selection");
  require(!picked(x) && picked(out) && x.width == out.width, "a selection goes from the tokens to the outputs, of one width");
  add(std::make_unique<Select>(x, out));
}

void Program::finish() {
  if (finished_) return;
  arena_ = Buffer(floats_ * sizeof(float));
  finished_ = true;
}

void Program::run(const int* tokens, int count, const std::vector<Segment>& segments, const std::vector<int>& numbers, bool every) {
  std::lock_guard alone(running_);
  require(count > 0 && count <= rows, "a step takes between 1 and " + std::to_string(rows) + " tokens, not " + std::to_string(count));
  int total = 0;
  std::vector<bool> seen(sequences, false);
  for (const Segment& s : segments) {
    require(s.sequence >= 0 && s.sequence < sequences && !seen[s.sequence], "sequences are numbered from 0 to " + std::to_string(sequences - 1) + ", each at most once in a step");
    seen[s.sequence] = true;
    require(s.count > 0 && s.count <= count && s.start >= 0 && s.start <= context - s.count, "tokens " + std::to_string(s.start) + " to " + std::to_string(int64_t(s.start) + s.count) + " are not within the context of " + std::to_string(context));
    for (int places : places_) require(s.start + s.count <= places, "there is no position " + std::to_string(s.start + s.count - 1));
    require(window() == 0 || s.start / window() == (s.start + s.count - 1) / window(), "a segment's tokens lie in one window of " + std::to_string(window()) + " tokens, which are packed together");
    total += s.count;
    require(total <= count, "the segments have more tokens than were given");
  }
  require(total == count, "the segments have fewer tokens than were given");
  for (int vocabulary : vocabularies_)
    for (int i = 0; i < count; ++i) require(tokens[i] >= 0 && tokens[i] < vocabulary, "token " + std::to_string(tokens[i]) + " is not among the " + std::to_string(vocabulary));
  require((every ? count : static_cast<int>(segments.size())) <= outputs, "a step gives the outputs of at most " + std::to_string(outputs) + " tokens");
  require(numbers.empty() || numbers.size() == segments.size(), "there is one adapter, or -1, for each sequence");
  std::vector<std::shared_ptr<const Adapter>> adapters(segments.size());
  for (size_t i = 0; i < numbers.size(); ++i) {
    require(numbers[i] < 0 || adapters_ != nullptr, "the program has no adapters");
    if (numbers[i] >= 0) adapters[i] = adapters_->at(numbers[i]);
  }
  finish();

  Step& s = step_;
  s.rows = count;
  s.segments = segments;
  s.token.assign(tokens, tokens + count);
  s.sequence.clear();
  s.position.clear();
  s.picked.clear();
  s.adapted.clear();
  for (size_t n = 0; n < s.segments.size(); ++n) {
    Segment& segment = s.segments[n];
    segment.row = static_cast<int>(s.sequence.size());
    if (adapters[n] != nullptr) {  // rows side by side with one adapter are taken together
      if (!s.adapted.empty() && s.adapted.back().adapter == adapters[n] && s.adapted.back().first + s.adapted.back().count == segment.row) {
        s.adapted.back().count += segment.count;
      } else {
        s.adapted.push_back({adapters[n], segment.row, segment.count});
      }
    }
    for (int i = 0; i < segment.count; ++i) {
      s.sequence.push_back(segment.sequence);
      s.position.push_back(segment.start + i);
      if (every || i == segment.count - 1) s.picked.push_back(segment.row + i);
    }
  }
  const int threads = Pool::get().size();
  s.pieces.clear();
  size_t shared = 0, own = 0;
  for (const auto& [heads, padded] : attentions_) {
    const Pieces& pieces = s.pieces.try_emplace(heads, s.segments, heads.first, heads.second, threads).first->second;
    shared = std::max(shared, pieces.scratch(padded));
  }
  if (own_bytes_ == 0) {
    for (const auto& operation : operations_) own = std::max(own, operation->own_scratch());
    own_bytes_ = whole_lines(own) + 64;
  }
  if (scratch_threads_ != threads) {
    for (const auto& operation : operations_) linear_scratch_ = std::max(linear_scratch_, whole_lines(operation->scratch(*this)) + 64);
    scratch_threads_ = threads;
  }
  shared = std::max(whole_lines(shared), linear_scratch_);
  if (scratch_.size() < shared + own_bytes_ * threads) scratch_ = Buffer(shared + own_bytes_ * threads);
  s.scratch = scratch_.data();
  s.own = scratch_.data() + shared;
  s.own_bytes = own_bytes_;
  Pool::get().run([&](const Team& team) {
    for (const auto& operation : operations_) {
      if (!timed) {
        operation->run(*this, s, team);
        continue;
      }
      const auto start = std::chrono::steady_clock::now();
      operation->run(*this, s, team);
      if (team.rank == 0) operation->seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
  });
}

void Program::release(int sequence, int first) {
  std::lock_guard alone(running_);
  require(sequence >= 0 && sequence < sequences && first >= 0 && first <= context, "a sequence and a token of it are released");
  for (const auto& cache : caches_) cache->release(sequence, first);
}

size_t Program::nbytes() const { return floats_ * sizeof(float) + scratch_.size() + cache_bytes(); }

size_t Program::cache_bytes() const {
  size_t bytes = 0;
  for (const auto& cache : caches_) bytes += cache->nbytes();
  return bytes;
}

std::vector<std::pair<std::string, double>> Program::profile() const {
  std::map<std::string, double> sums;
  for (const auto& operation : operations_) sums[operation->name] += operation->seconds;
  return {sums.begin(), sums.end()};
}

}  // namespace trimtab
