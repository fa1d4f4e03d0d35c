// A product with its kernel, and rows of x in the form that it takes: what Gemm and Experts share.
#pragma once

#include <stdint.h>

#include <memory>
#include <vector>

#include "gemm/gemm.h"
#include "gemm/kernel.h"

namespace fewbits {

// How rows of x are prepared for a product, and for all that take x alike.
struct Form {
  const GemmKernel* kernel;
  const Product* product;
  std::vector<Span> spans;
  std::vector<int32_t> x_groups;      // by span; empty where x has one scale or none
  int64_t span_words;                 // of each span, or 0 where they differ
  int64_t value_stride, span_stride;  // words of a row

  Form(const Product& product, const GemmKernel& kernel);

  SpanList list() const;
  bool serves(const Product& other, const GemmKernel& its_kernel) const;
};

// Rows of x in a form. The memory is the caller's: words() of it, of 32 bits.
class Rows {
 public:
  static int64_t words(const Form& form, int64_t rows);

  Rows(const Form& form, int64_t rows, float* memory);

  // Prepares row m of x [K].
  void set(int64_t m, const float* x) const;

  // Takes row m over from `other`, of the same form.
  void copy(int64_t m, const Rows& other, int64_t row) const;

 private:
  friend struct BoundProduct;
  const Form* form_;
  uint32_t *values_, *sums_;
  float *scales_, *factors_, *zeros_;
};

// A product that has been checked, with the kernel that computes it.
struct BoundProduct {
  std::shared_ptr<const Product> product;
  const GemmKernel* kernel;

  // Throws std::invalid_argument; see Gemm.
  explicit BoundProduct(std::shared_ptr<const Product> product);

  // `rows` rows of x from `begin` on, at most kMaxRows, times a panel of the weight, whose columns
  // of the product begin at the target. `next`: what the thread reads afterwards.
  void multiply(const Rows& x, int64_t begin, int64_t rows, int64_t panel, const uint32_t* next,
                const Target& target) const;
};

// The index of the form that serves a product, added where none does.
size_t form_for(std::vector<Form>& forms, const BoundProduct& bound);

// Row m of x, in the thread's memory where it has to be computed; until the thread's next call.
const float* row_of(const RowSource& x, int64_t K, int64_t m);

// The calling thread's memory for prepared rows, kept from call to call: at least so many words of
// 32 bits.
float* prepared_memory(int64_t words);

}  // namespace fewbits
