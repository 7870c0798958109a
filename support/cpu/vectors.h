// Vectors of LANES rows, included once for every processor, in a namespace that defines LANES and TARGET.

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint8_t Octets __attribute__((vector_size(4 * LANES)));

template <class Vector>
TARGET INLINE Vector load(const void* source) {  // from any address
    Vector out;
    std::memcpy(&out, source, sizeof out);
    return out;
}
