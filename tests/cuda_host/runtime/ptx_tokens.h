// The words and signs of PTX, one after another.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace cuda_host::ptx {

class Tokens {
 public:
  Tokens(const std::string& path, const std::string& text);

  bool at_end() const { return at_ == tokens_.size(); }
  const std::string& peek(size_t ahead = 0) const;  // empty at the end
  const std::string& next();
  bool accept(const std::string& text) { return peek() == text && ++at_; }
  void expect(const std::string& text);
  void skip_line();
  void skip_braces();  // with what is between them
  uint32_t line() const { return tokens_[std::min(at_, tokens_.size() - 1)].line; }
  uint32_t last_line() const { return tokens_.back().line; }
  // Throws Violation with the path and the line.
  [[noreturn]] void refuse(const std::string& what) const;

 private:
  struct Token {
    std::string text;
    uint32_t line;
  };
  std::string path_;
  std::vector<Token> tokens_;
  size_t at_ = 0;
};

}  // namespace cuda_host::ptx
