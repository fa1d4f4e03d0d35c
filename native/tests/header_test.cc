// Headers in the form of the safetensors library are read, anything else gives nothing, and nothing
// is read beyond the end of the text: under the address sanitizer each text ends with its memory.
#include "header.h"

#include <stdint.h>

#include <memory>
#include <string>

#include "check.h"

namespace fewbits {
namespace {

const DtypeBits kBits = {{"U8", 8}, {"F16", 16}, {"F64", 64}, {"F4", 4}};

struct Result {
  std::unique_ptr<char[]> text;  // what the header's views are into
  std::optional<Header> header;
};

Result read(const std::string& text) {
  Result result;
  result.text = std::make_unique<char[]>(text.size());
  text.copy(result.text.get(), text.size());
  result.header = read_header({result.text.get(), text.size()}, kBits);
  return result;
}

std::string tensor(const std::string& name, const std::string& dtype, const std::string& shape,
                   const std::string& offsets) {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":[" + shape +
         "],\"data_offsets\":[" + offsets + "]}";
}

const std::string kMetadata = R"("__metadata__":{"format":"pt","a":""})";
const std::string kSound =
    "{" + kMetadata + "," + tensor("a.weight", "F16", "2,3", "0,12") + "," +
    tensor("b", "U8", "", "12,13") + "," + tensor("c d", "F16", "2,3", "13,25") + "," +
    tensor("", "F64", "5,0", "25,25") + "," + tensor("~", "F4", "2,1,1,1,1,1,1,1", "25,26") + "}";

void test_sound() {
  for (const std::string spaces : {"", " ", "       "}) {
    const Result result = read(kSound + spaces);
    CHECK(result.header.has_value(), "%s", kSound.c_str());
    const Header& header = *result.header;
    CHECK(header.nbytes == 26 && header.tensors.size() == 5 && header.kinds.size() == 4,
          "%zu tensors of %zu kinds", header.tensors.size(), header.kinds.size());
    const char* const names[] = {"a.weight", "b", "c d", "", "~"};
    const int64_t begins[] = {0, 12, 13, 25, 25};
    const size_t kinds[] = {0, 1, 0, 2, 3};
    for (size_t i = 0; i < 5; ++i) {
      const HeaderTensor& found = header.tensors[i];
      CHECK(found.name == names[i] && found.begin == begins[i] && found.kind == kinds[i],
            "tensor %zu", i);
    }
    const TensorKind& first = header.kinds[0];
    CHECK(first.dtype == "F16" && first.nbytes == 12, "%ld", static_cast<long>(first.nbytes));
    CHECK((first.shape == std::vector<int64_t>{2, 3}), "%zu axes", first.shape.size());
    CHECK(header.kinds[1].shape.empty() && header.kinds[1].nbytes == 1, "a scalar");
    CHECK(header.kinds[3].shape.size() == 8 && header.kinds[3].nbytes == 1, "eight axes");
  }
  const std::string large = std::to_string(int64_t{1} << 56);
  CHECK(read("{" + tensor("a", "U8", large + ",1", "0," + large) + "}").header, "2^56 elements");
  CHECK(read("{" + tensor("a", "U8", "0," + large, "0,0") + "}").header, "none of 2^56");
  const std::string name(4096, 'x');
  CHECK(read("{" + tensor(name, "U8", "1", "0,1") + "}").header, "a name of 4096 characters");
  CHECK(read("{\"__metadata__\":{}," + tensor("a", "U8", "1", "0,1") + "}").header, "no metadata");
}

void test_refused() {
  const std::string one = tensor("a", "U8", "4", "0,4");
  const std::string digits(18, '9');
  const std::string texts[] = {
      "",
      "{}",
      "[]",
      "{" + kMetadata + "}",
      one,
      " {" + one + "}",
      "{" + one,
      "{" + one + "}}",
      "{" + one + "}\n",
      "{" + one + "} x",
      "{" + one + ",}",
      "{" + one + " }",
      "{" + one + "," + kMetadata + "}",
      "{" + kMetadata + "," + kMetadata + "," + one + "}",
      R"({"__metadata__":{"a":"1","a":"2"},)" + one + "}",
      R"({"__metadata__":{"a":1},)" + one + "}",
      R"({"__metadata__":{"a":"\n"},)" + one + "}",
      R"({"__metadata__":[],)" + one + "}",
      "{" + tensor("__metadata__", "U8", "4", "0,4") + "}",
      "{" + tensor("a\\u0062", "U8", "4", "0,4") + "}",
      "{" + tensor("a\"", "U8", "4", "0,4") + "}",
      "{" + tensor("\xc3\xa4", "U8", "4", "0,4") + "}",
      "{" + tensor("a\n", "U8", "4", "0,4") + "}",
      "{" + tensor(std::string("a\0", 2), "U8", "4", "0,4") + "}",
      "{" + tensor(std::string(4097, 'x'), "U8", "4", "0,4") + "}",
      "{" + tensor("a", "U9", "4", "0,4") + "}",
      "{" + tensor("a", "", "4", "0,4") + "}",
      "{" + tensor("a", "U8", "04", "0,4") + "}",
      "{" + tensor("a", "U8", "-4", "0,4") + "}",
      "{" + tensor("a", "U8", "4.0", "0,4") + "}",
      "{" + tensor("a", "U8", "4e0", "0,4") + "}",
      "{" + tensor("a", "U8", "true", "0,4") + "}",
      "{" + tensor("a", "U8", "[4]", "0,4") + "}",
      "{" + tensor("a", "U8", "4,", "0,4") + "}",
      "{" + tensor("a", "U8", ",4", "0,4") + "}",
      "{" + tensor("a", "U8", " 4", "0,4") + "}",
      "{" + tensor("a", "U8", "1,1,1,1,1,1,1,1,4", "0,4") + "}",
      "{" + tensor("a", "U8", "4", "0,3") + "}",
      "{" + tensor("a", "U8", "4", "0,5") + "}",
      "{" + tensor("a", "U8", "4", "4,0") + "}",
      "{" + tensor("a", "U8", "4", "1,5") + "}",
      "{" + tensor("a", "U8", "4", "00,4") + "}",
      "{" + tensor("a", "U8", "4", "-4,0") + "}",
      "{" + tensor("a", "U8", "4", "0,4,4") + "}",
      "{" + tensor("a", "U8", "4", "0") + "}",
      "{" + tensor("a", "F4", "3", "0,2") + "}",
      "{" + tensor("a", "U8", digits, "0," + digits) + "}",
      "{" + tensor("a", "U8", "4294967296,4294967296,4", "0,4") + "}",
      "{" + tensor("a", "U8", "0," + digits, "0,0") + "}",
      "{" + tensor("a", "U8", "1" + digits, "0,1" + digits) + "}",
      "{" + tensor("a", "U8", "4", "0,18446744073709551620") + "}",
      "{" + one + "," + tensor("b", "U8", "4", "0,4") + "}",
      "{" + one + "," + tensor("b", "U8", "4", "5,9") + "}",
      R"({"a":{"shape":[4],"dtype":"U8","data_offsets":[0,4]}})",
      R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4],"x":1}})",
      R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":1})",
      R"({"a": {"dtype":"U8","shape":[4],"data_offsets":[0,4]}})",
      R"({"a":{"dtype":"U8","data_offsets":[0,4],"shape":[4]}})",
  };
  for (const std::string& text : texts) CHECK(!read(text).header, "%s", text.c_str());
  // What follows a kind that is known is read as strictly.
  for (const std::string shape : {"4]", "4,", "4 ", "4\"", "4]]"}) {
    const std::string text = "{" + one + "," + tensor("b", "U8", shape, "4,8") + "}";
    CHECK(!read(text).header, "%s", text.c_str());
  }
}

// Whatever comes of a text, what is accepted holds together.
void check_sense(const std::string& text) {
  const Result result = read(text);
  if (!result.header) return;
  int64_t position = 0;
  for (const HeaderTensor& tensor : result.header->tensors) {
    CHECK(tensor.kind < result.header->kinds.size(), "%s", text.c_str());
    CHECK(tensor.begin == position, "%s", text.c_str());
    position += result.header->kinds[tensor.kind].nbytes;
  }
  CHECK(position == result.header->nbytes, "%s", text.c_str());
}

void test_changed() {
  for (size_t length = 0; length < kSound.size(); ++length) {
    CHECK(!read(kSound.substr(0, length)).header, "%zu bytes", length);
  }
  const std::string bytes("\0 \n\"\\{}[]:,.-+eE0189aUF\x7f\xff", 25);
  for (size_t place = 0; place < kSound.size(); ++place) {
    for (const char byte : bytes) {
      std::string text = kSound;
      text[place] = byte;
      check_sense(text);
      check_sense(kSound.substr(0, place) + byte + kSound.substr(place));
    }
  }
  Random random(1);
  for (int i = 0; i < 20000; ++i) {
    std::string text = kSound;
    for (int change = random.below(3); change >= 0; --change) {
      const size_t from = random.below(static_cast<int>(text.size()));
      const std::string part = text.substr(from, random.below(80));
      if (random.below(2)) text.erase(from, part.size());
      if (!text.empty()) text.insert(random.below(static_cast<int>(text.size())), part);
      if (text.empty()) break;
    }
    check_sense(text);
  }
}

}  // namespace
}  // namespace fewbits

int main() {
  fewbits::test_sound();
  fewbits::test_refused();
  fewbits::test_changed();
}
