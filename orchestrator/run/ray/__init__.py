"""Train on Ray and submit runs to its job server; nothing outside this package imports ray."""
