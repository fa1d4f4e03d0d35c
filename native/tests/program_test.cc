// Programs of random steps beside the same steps on arrays of their own: values that share memory
// don't meet, whatever was there before, and no step leaves what it was lent.
#include "program/program.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "check.h"

namespace fewbits {
namespace {

using Arrays = std::vector<std::vector<float>>;

void add(Arrays& arrays, int x, int to) {
  for (size_t i = 0; i < arrays[x].size(); ++i) arrays[to][i] += arrays[x][i];
}

// Steps that make a value of two earlier ones, side by side, or add one to another. `inputs` and
// values are of the widths of `widths`.
struct Case {
  Program program;
  std::vector<int64_t> widths;
  Random random;
  int64_t T;
  Arrays expected;

  Case(uint32_t seed, int inputs, int64_t rows) : program(inputs), random(seed), T(rows) {
    for (int i = 0; i < inputs; ++i) {
      widths.push_back(1 + random.below(40));
      expected.emplace_back(T * widths.back());
      for (float& value : expected.back()) value = static_cast<float>(random.below(9));
    }
  }

  int any() { return random.below(static_cast<int>(widths.size())); }

  void join(int x, int y) {
    const int64_t width = widths[x] + widths[y];
    const Program::Value made = program.value(width);
    program.copy(x, made, {1, widths[x], 0, widths[x], width, 0});
    program.copy(y, made, {1, widths[y], 0, widths[y], width, widths[x]});
    std::vector<float> joined;
    for (int64_t t = 0; t < T; ++t) {
      for (const int part : {x, y}) {
        const auto row = expected[part].begin() + t * widths[part];
        joined.insert(joined.end(), row, row + widths[part]);
      }
    }
    widths.push_back(width);
    expected.push_back(joined);
  }

  void step() {
    const int x = any(), y = any();
    if (widths[x] == widths[y] && x != y) {
      program.add(x, y, widths[x]);
      add(expected, x, y);
    } else if (widths[x] + widths[y] < 300) {
      join(x, y);
    }
  }

  // The last value of all is added to the first input, as its first columns.
  void end() {
    const int last = static_cast<int>(widths.size()) - 1;
    if (last == 0 || widths[last] < widths[0]) return;
    const Program::Value part = program.value(widths[0]);
    program.copy(last, part, {1, widths[last], 0, widths[0], widths[0], 0});
    program.add(part, 0, widths[0]);
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t n = 0; n < widths[0]; ++n) {
        expected[0][t * widths[0] + n] += expected[last][t * widths[last] + n];
      }
    }
  }
};

void test_random(uint32_t seed, int inputs, int64_t T, int steps) {
  Case one(seed, inputs, T);
  Arrays given(one.expected);
  for (int i = 0; i < steps; ++i) one.step();
  one.end();
  const Step step = {T, nullptr, nullptr, 0, nullptr, nullptr, nullptr, 0, nullptr};
  // No more than it asks for: the sanitizer sees what goes beyond.
  const int64_t floats = T * one.program.widths().all;
  const std::unique_ptr<float[]> memory(new float[floats]);
  std::fill_n(memory.get(), floats, -1e30f);
  std::vector<int64_t> nanoseconds(one.program.steps(), 0);
  Program::Arguments arguments = {{}, &step, nullptr};
  Program::Shared shared = {memory.get(), {}, {}, nullptr, [] { CHECK(false, "it took no time"); }};
  for (auto& array : given) arguments.inputs.push_back(array.data());
  const Arrays before = given;
  one.program.run(arguments, shared);
  for (int i = 0; i < inputs; ++i) CHECK(given[i] == one.expected[i], "input %d, seed %u", i, seed);
  // Again, over what the first call left, and timed.
  given = before;
  for (int i = 0; i < inputs; ++i) arguments.inputs[i] = given[i].data();
  shared.nanoseconds = nanoseconds.data();
  one.program.run(arguments, shared);
  for (int i = 0; i < inputs; ++i) CHECK(given[i] == one.expected[i], "again, seed %u", seed);
}

// Values that aren't needed any more make room.
void test_memory() {
  Program chain(1);
  Program::Value last = 0;
  for (int i = 0; i < 20; ++i) {
    const Program::Value next = chain.value(32);
    chain.copy(last, next, {1, 32, 0, 32, 32, 0});
    last = next;
  }
  CHECK(chain.widths().all == 64, "%ld", static_cast<long>(chain.widths().all));
  Program wide(1);
  const Program::Value both[] = {wide.value(32), wide.value(5)};
  wide.route({5, 5, Score::softmax, true, 0, 1, nullptr}, 0, both[0], both[1]);
  CHECK(wide.widths().all == 48, "%ld", static_cast<long>(wide.widths().all));
}

}  // namespace
}  // namespace fewbits

int main() {
  using namespace fewbits;
  for (uint32_t seed = 0; seed < 400; ++seed) {
    if (skip_case()) continue;
    test_random(seed, 1 + static_cast<int>(seed % 3), static_cast<int64_t>(seed % 5),
                1 + static_cast<int>(seed % 30));
  }
  test_memory();
}
