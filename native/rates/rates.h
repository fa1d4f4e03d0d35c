// What the machine can give: the limits that speeds are compared with. Each call is one measurement
// of a few milliseconds; whoever asks takes the median of several.
#pragma once

#include <stddef.h>

#include <string>

#include "memory.h"

namespace fewbits {

// Memory to read, in huge pages where the system has them: more than the caches hold.
class ReadProbe {
 public:
  explicit ReadProbe(size_t bytes);  // rounded down to whole blocks, at least one

  size_t bytes() const { return memory_.bytes(); }

  // Bytes per second that all threads of the pool read together, each a part.
  double rate() const;

 private:
  Buffer memory_;
};

enum class Dot { f32, bf16, int8, int16 };

// Throws std::invalid_argument for a name that isn't f32, bf16, int8 or int16.
Dot dot(const std::string& name);

// Multiply-accumulates per second of all threads of the pool, in the tier in use; 0 where it has no
// instruction for the dot.
double dot_rate(Dot dot);

}  // namespace fewbits
