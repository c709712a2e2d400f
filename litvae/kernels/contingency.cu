// Written by `make export` from nbs/kernels/13_contingency.ipynb; edit that.

template <class T>
__device__ inline int table_cell(T truth, T guess, int rows, int columns) {       // -1: not counted
    bool inside = truth >= 0 && truth < rows && guess >= 0 && guess < columns;
    return inside ? (int)truth * columns + (int)guess : -1;
}

// A block an image; for tables of at most 4096 cells.
template <class T>
__global__ void contingency_tables(const T* __restrict__ truth, const T* __restrict__ guess,
                                   long long* __restrict__ tables, int rows, int columns, int pixels) {
    __shared__ int table[4096];
    int cells = rows * columns;
    for (int i = threadIdx.x; i < cells; i += blockDim.x) table[i] = 0;
    __syncthreads();
    size_t first = (size_t)blockIdx.x * pixels;
    for (int p = threadIdx.x; p < pixels; p += blockDim.x) {
        int cell = table_cell(truth[first + p], guess[first + p], rows, columns);
        if (cell >= 0) atomicAdd(&table[cell], 1);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < cells; i += blockDim.x) tables[(size_t)blockIdx.x * cells + i] = table[i];
}

// A thread a pixel; count: pixels of the whole batch. There is no atomicAdd for signed numbers of 64 bits.
template <class T>
__global__ void contingency_tables_large(const T* __restrict__ truth, const T* __restrict__ guess,
                                         unsigned long long* __restrict__ tables, int rows, int columns,
                                         int pixels, int count) {
    int i = thread_index();
    if (i >= count) return;
    int cell = table_cell(truth[i], guess[i], rows, columns);
    if (cell >= 0) atomicAdd(&tables[(size_t)(i / pixels) * rows * columns + cell], 1ull);
}
