#include "header.h"

#include <set>

namespace fewbits {
namespace {

// Those of checkpoint/files.py, which explains what is beyond them.
constexpr size_t kMostAxes = 8;
constexpr size_t kLongestName = 4096;
constexpr int64_t kMostElements = int64_t{1} << 56;
constexpr size_t kMostDigits = 18;  // of a number below 2^63, whatever they are

bool plain(char c) { return c >= ' ' && c <= '~' && c != '"' && c != '\\'; }
bool digit(char c) { return c >= '0' && c <= '9'; }

// What is left of a text. Each method takes something off its front and says whether it was there.
class Cursor {
 public:
  explicit Cursor(std::string_view text) : rest_(text) {}

  bool done() const { return rest_.empty(); }

  bool skip(std::string_view expected) {
    if (!rest_.starts_with(expected)) return false;
    rest_.remove_prefix(expected.size());
    return true;
  }

  // As far as a character, and with it.
  bool through(char last, std::string_view& text) {
    const size_t place = rest_.find(last);
    if (place == rest_.npos) return false;
    text = take(place + 1);
    return true;
  }

  // A string that stands for itself.
  bool string(std::string_view& value) {
    if (!skip("\"")) return false;
    size_t length = 0;
    while (length < rest_.size() && plain(rest_[length])) ++length;
    value = take(length);
    return skip("\"");
  }

  bool number(int64_t& value) {
    size_t length = 0;
    value = 0;
    while (length < rest_.size() && length < kMostDigits && digit(rest_[length])) {
      value = 10 * value + (rest_[length++] - '0');
    }
    const std::string_view digits = take(length);
    return length == 1 || (length > 1 && digits[0] != '0');
  }

 private:
  std::string_view take(size_t length) {
    const std::string_view taken = rest_.substr(0, length);
    rest_.remove_prefix(length);
    return taken;
  }

  std::string_view rest_;
};

// {"key":"value",...}, each key once.
bool skip_metadata(Cursor& cursor) {
  if (!cursor.skip("{")) return false;
  if (cursor.skip("}")) return true;
  std::set<std::string_view> keys;
  do {
    std::string_view key, value;
    if (!cursor.string(key) || !cursor.skip(":") || !cursor.string(value)) return false;
    if (!keys.insert(key).second) return false;
  } while (cursor.skip(","));
  return cursor.skip("}");
}

// "dtype":"F16","shape":[2,3]
bool read_kind(std::string_view text, const DtypeBits& bits, TensorKind& kind) {
  Cursor cursor(text);
  if (!cursor.skip("\"dtype\":") || !cursor.string(kind.dtype)) return false;
  if (!cursor.skip(",\"shape\":[")) return false;
  const auto found = bits.find(kind.dtype);
  if (found == bits.end()) return false;
  int64_t elements = 1;  // without the empty axes
  bool empty = false;
  if (!cursor.skip("]")) {
    do {
      int64_t size;
      if (!cursor.number(size) || kind.shape.size() == kMostAxes) return false;
      kind.shape.push_back(size);
      empty = empty || size == 0;
      if (size > kMostElements / elements) return false;
      if (size > 0) elements *= size;
    } while (cursor.skip(","));
    if (!cursor.skip("]")) return false;
  }
  const int64_t all_bits = empty ? 0 : elements * found->second;
  kind.nbytes = all_bits / 8;
  return cursor.done() && all_bits % 8 == 0;
}

}  // namespace

std::optional<Header> read_header(std::string_view text, const DtypeBits& bits) {
  Header header;
  std::map<std::string_view, size_t>
      kinds;  // by their text; a tree, since a hash can be made to collide
  Cursor cursor(text);
  if (!cursor.skip("{")) return std::nullopt;
  if (cursor.skip("\"__metadata__\":") && !(skip_metadata(cursor) && cursor.skip(","))) {
    return std::nullopt;
  }
  do {
    HeaderTensor tensor;
    std::string_view kind;
    if (!cursor.string(tensor.name) || !cursor.skip(":{") || !cursor.through(']', kind)) {
      return std::nullopt;
    }
    if (tensor.name.size() > kLongestName || tensor.name == "__metadata__") return std::nullopt;
    const auto [found, added] = kinds.try_emplace(kind, header.kinds.size());
    if (added && !read_kind(kind, bits, header.kinds.emplace_back())) return std::nullopt;
    tensor.kind = found->second;
    int64_t end;
    if (!cursor.skip(",\"data_offsets\":[") || !cursor.number(tensor.begin) || !cursor.skip(",") ||
        !cursor.number(end) || !cursor.skip("]}")) {
      return std::nullopt;
    }
    if (tensor.begin != header.nbytes || end - tensor.begin != header.kinds[tensor.kind].nbytes) {
      return std::nullopt;
    }
    header.nbytes = end;
    header.tensors.push_back(tensor);
  } while (cursor.skip(","));
  if (!cursor.skip("}")) return std::nullopt;
  while (cursor.skip(" ")) {
  }
  if (!cursor.done()) return std::nullopt;
  return header;
}

}  // namespace fewbits
