"""One module a family, each with cases(quick) and, where memory is promised, memory_cases(quick)."""
