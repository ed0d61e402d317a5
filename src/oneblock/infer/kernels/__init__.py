"""Our own C++ for products of few rows on CPUs; torch's stands in where it cannot be compiled."""
