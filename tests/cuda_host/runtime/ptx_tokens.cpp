#include "ptx_tokens.h"

#include <cctype>

#include "report.h"

namespace cuda_host::ptx {
namespace {

bool part_of_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '.'; }

}  // namespace

Tokens::Tokens(const std::string& path, const std::string& text) : path_(path) {
  uint32_t line = 1;
  for (size_t i = 0; i < text.size();) {
    const char c = text[i];
    if (std::isspace(static_cast<unsigned char>(c))) {
      line += c == '\n';
      ++i;
      continue;
    }
    if (text.compare(i, 2, "//") == 0) {
      i = text.find('\n', i);
      continue;
    }
    size_t end = i + 1;
    if (c == '"') {
      end = text.find('"', end) + 1;
    } else if (part_of_word(c) || c == '%') {
      while (part_of_word(text[end]) || text.compare(end, 2, "::") == 0) end += text[end] == ':' ? 2 : 1;
    }
    tokens_.push_back({text.substr(i, end - i), line});
    i = end;
  }
}

const std::string& Tokens::peek(size_t ahead) const {
  static const std::string none;
  return at_ + ahead < tokens_.size() ? tokens_[at_ + ahead].text : none;
}

const std::string& Tokens::next() {
  if (at_end()) refuse("the text ends too early");
  return tokens_[at_++].text;
}

void Tokens::expect(const std::string& text) {
  if (!accept(text)) refuse("`" + peek() + "` where `" + text + "` should be");
}

void Tokens::skip_line() {
  for (const uint32_t first = line(); !at_end() && line() == first;) ++at_;
}

void Tokens::skip_braces() {
  int depth = 0;
  do depth += peek() == "{" ? 1 : peek() == "}" ? -1 : 0;
  while (next(), depth > 0);
}

void Tokens::refuse(const std::string& what) const {
  throw Violation(path_ + ":" + std::to_string(line()) + ": " + what);
}

}  // namespace cuda_host::ptx
