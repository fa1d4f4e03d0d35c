// The gated activation by the names of `ops.Activation`.
#pragma once

#include <stdexcept>
#include <string>

#include "elementwise/elementwise.h"

inline fewbits::Gating gating_of(const std::string& activation, float limit) {
  if (activation == "silu") return {fewbits::Gating::Kind::silu, limit};
  if (activation == "swiglu_oai") return {fewbits::Gating::Kind::swiglu_oai, limit};
  throw std::invalid_argument("an activation is silu or swiglu_oai, not " + activation);
}
