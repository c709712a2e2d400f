// Written by `make export` from nbs/kernels/09_native.ipynb; edit that.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

namespace {

struct bf16 { uint16_t bits; };

inline float as_float(uint32_t bits) { float value; std::memcpy(&value, &bits, 4); return value; }
inline uint32_t as_bits(float value) { uint32_t bits; std::memcpy(&bits, &value, 4); return bits; }

inline float load(float value) { return value; }
inline float load(bf16 value) { return as_float((uint32_t)value.bits << 16); }
inline void store(float& place, float value) { place = value; }
inline void store(bf16& place, float value) {                      // to the nearest, ties to even; NaN stays NaN
    uint32_t bits = as_bits(value), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    place.bits = (uint16_t)(value != value ? 0x7fc0u : rounded);
}

// r of the text above, and 2^n; x is cut to where 2^n is a normal number.
inline float reduced(float x, float& power) {
    const float magic = 12582912.0f;
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float shifted = x * 1.44269504f + magic, n = shifted - magic;
    power = as_float((as_bits(shifted) - as_bits(magic) + 127u) << 23);
    return (x - n * 0.693359375f) + n * 2.12194440e-4f;
}

inline float small_expm1(float r) {
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * r * r + r;
}

inline float exponential(float x) { float power, r = reduced(x, power); return (small_expm1(r) + 1.0f) * power; }
inline float exponential_minus_1(float x) {
    float power, r = reduced(x, power);
    return small_expm1(r) * power + (power - 1.0f);
}
inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// Calls work(first, end) for parts of 0 .. count - 1; `numbers`: how much there is to do in all.
template <class F> void share(int64_t count, int64_t numbers, int64_t threads, F work) {
    threads = std::min({threads, count, numbers >> 18});
    std::vector<std::thread> others;
    int64_t first = 0;
    for (int64_t t = 1; t < threads; ++t) {
        int64_t end = count * t / threads;
        try { others.emplace_back(work, first, end); }
        catch (const std::system_error&) { work(first, end); }     // the system has no thread left
        first = end;
    }
    work(first, count);
    for (auto& other : others) other.join();
}

struct Sizes { int64_t batch, channels, pixels; };
struct Norm { float mean, inverse, weight, bias; };                // inverse: of the standard deviation

inline float standard(float x, const Norm& c) { return (x - c.mean) * c.inverse; }
inline float affine(float x, const Norm& c) { return x * c.weight + c.bias; }

template <class T> void plane_sums(const T* x, int64_t pixels, float shift, double& sum, double& square) {
    float s = 0, q = 0;
    #pragma omp simd reduction(+ : s, q)
    for (int64_t p = 0; p < pixels; ++p) {
        float value = load(x[p]) - shift;
        s += value;
        q += value * value;
    }
    sum += s;
    square += q;
}

template <class T> void statistics(const T* x, Sizes n, float* mean, float* variance, int64_t threads) {
    share(n.channels, n.batch * n.channels * n.pixels, threads, [=](int64_t first, int64_t end) {
        std::vector<double> sum(n.channels), square(n.channels);
        std::vector<float> shift(n.channels);
        for (int64_t c = first; c < end; ++c) {
            plane_sums(x + c * n.pixels, n.pixels, 0.0f, sum[c], square[c]);
            shift[c] = (float)(sum[c] / n.pixels);
            sum[c] = square[c] = 0;
        }
        for (int64_t b = 0; b < n.batch; ++b)
            for (int64_t c = first; c < end; ++c)
                plane_sums(x + (b * n.channels + c) * n.pixels, n.pixels, shift[c], sum[c], square[c]);
        for (int64_t c = first; c < end; ++c) {
            double count = (double)n.batch * n.pixels, offset = sum[c] / count;
            double about = square[c] / count - offset * offset;
            mean[c] = (float)(shift[c] + offset);
            variance[c] = (float)(about < 0 ? 0 : about);
        }
    });
}

inline std::vector<Norm> norms(const float* weight, const float* bias, const float* mean, const float* variance,
                               int64_t channels, float eps) {
    std::vector<Norm> found;
    for (int64_t c = 0; c < channels; ++c)
        found.push_back({mean[c], 1.0f / std::sqrt(variance[c] + eps), weight[c], bias[c]});
    return found;
}

template <class T>
void gate(const T* x, const float* weight, const float* bias, float* mean, float* variance, T* y, Sizes n, float eps,
          bool training, int64_t threads) {
    if (training) statistics(x, n, mean, variance, threads);
    const int64_t half = n.channels / 2;
    const std::vector<Norm> norm = norms(weight, bias, mean, variance, n.channels, eps);
    share(n.batch, n.batch * n.channels * n.pixels, threads, [=, &norm](int64_t first, int64_t end) {
        for (int64_t b = first; b < end; ++b)
            for (int64_t c = 0; c < half; ++c) {
                const Norm na = norm[c], nq = norm[c + half];
                const T *a = x + (b * n.channels + c) * n.pixels, *q = a + half * n.pixels;
                T* out = y + (b * half + c) * n.pixels;
                #pragma omp simd
                for (int64_t p = 0; p < n.pixels; ++p)
                    store(out[p], affine(standard(load(a[p]), na), na) * sigmoid(affine(standard(load(q[p]), nq), nq)));
            }
    });
}

// What is known about one pixel of a signal and its gate: both standardised, and their gradients.
struct Gradients { float a, q, da, dq; };

inline Gradients gradients(float g, float a, float q, const Norm& na, const Norm& nq) {
    a = standard(a, na);
    q = standard(q, nq);
    float open = sigmoid(affine(q, nq)), da = g * open;
    return {a, q, da, da * affine(a, na) * (1.0f - open)};
}

template <class T>
void gate_backward(const T* grad, const T* x, const float* weight, const float* bias, const float* mean,
                   const float* variance, T* dx, float* dweight, float* dbias, Sizes n, float eps, bool training,
                   int64_t threads) {
    const int64_t half = n.channels / 2, numbers = n.batch * n.channels * n.pixels;
    const std::vector<Norm> norm = norms(weight, bias, mean, variance, n.channels, eps);
    share(half, numbers, threads, [=, &norm](int64_t first, int64_t end) {
        std::vector<double> sums(4 * half);
        for (int64_t b = 0; b < n.batch; ++b)
            for (int64_t c = first; c < end; ++c) {
                const Norm na = norm[c], nq = norm[c + half];
                const T *a = x + (b * n.channels + c) * n.pixels, *q = a + half * n.pixels;
                const T* g = grad + (b * half + c) * n.pixels;
                float da = 0, daa = 0, dq = 0, dqq = 0;
                #pragma omp simd reduction(+ : da, daa, dq, dqq)
                for (int64_t p = 0; p < n.pixels; ++p) {
                    Gradients d = gradients(load(g[p]), load(a[p]), load(q[p]), na, nq);
                    da += d.da;
                    daa += d.da * d.a;
                    dq += d.dq;
                    dqq += d.dq * d.q;
                }
                double* sum = &sums[4 * c];
                sum[0] += da;
                sum[1] += daa;
                sum[2] += dq;
                sum[3] += dqq;
            }
        for (int64_t c = first; c < end; ++c)
            for (int64_t k = 0; k < 2; ++k) {
                dbias[c + k * half] = (float)sums[4 * c + 2 * k];
                dweight[c + k * half] = (float)sums[4 * c + 2 * k + 1];
            }
    });
    // A mean of the batch depends on every number in it, a running mean on none.
    const float part = training ? (float)(1.0 / ((double)n.batch * n.pixels)) : 0.0f;
    share(n.batch, numbers, threads, [=, &norm](int64_t first, int64_t end) {
        for (int64_t b = first; b < end; ++b)
            for (int64_t c = 0; c < half; ++c) {
                const Norm na = norm[c], nq = norm[c + half];
                const T *a = x + (b * n.channels + c) * n.pixels, *q = a + half * n.pixels;
                const T* g = grad + (b * half + c) * n.pixels;
                T *ga = dx + (b * n.channels + c) * n.pixels, *gq = ga + half * n.pixels;
                const float ma = dbias[c] * part, maa = dweight[c] * part, sa = na.weight * na.inverse;
                const float mq = dbias[c + half] * part, mqq = dweight[c + half] * part, sq = nq.weight * nq.inverse;
                #pragma omp simd
                for (int64_t p = 0; p < n.pixels; ++p) {
                    Gradients d = gradients(load(g[p]), load(a[p]), load(q[p]), na, nq);
                    store(ga[p], sa * (d.da - ma - d.a * maa));
                    store(gq[p], sq * (d.dq - mq - d.q * mqq));
                }
            }
    });
}

template <class T> void elu(const T* x, T* y, int64_t count, int64_t threads) {
    share(count, count, threads, [=](int64_t first, int64_t end) {
        #pragma omp simd
        for (int64_t i = first; i < end; ++i) {
            float value = load(x[i]), below = exponential_minus_1(value);
            store(y[i], value > 0.0f ? value : below);
        }
    });
}

template <class T> void elu_gradient(const T* grad, const T* x, T* dx, int64_t count, int64_t threads) {
    share(count, count, threads, [=](int64_t first, int64_t end) {
        #pragma omp simd
        for (int64_t i = first; i < end; ++i) {
            float value = load(x[i]), g = load(grad[i]), below = g * exponential(value);
            store(dx[i], value > 0.0f ? g : below);
        }
    });
}

}  // namespace

extern "C" {

void bn_glu(const void* x, const float* weight, const float* bias, float* mean, float* variance, void* y,
            int64_t batch, int64_t channels, int64_t pixels, float eps, int training, int narrow, int64_t threads) {
    Sizes n{batch, channels, pixels};
    if (narrow) gate((const bf16*)x, weight, bias, mean, variance, (bf16*)y, n, eps, training, threads);
    else gate((const float*)x, weight, bias, mean, variance, (float*)y, n, eps, training, threads);
}

void bn_glu_backward(const void* grad, const void* x, const float* weight, const float* bias, const float* mean,
                     const float* variance, void* dx, float* dweight, float* dbias, int64_t batch, int64_t channels,
                     int64_t pixels, float eps, int training, int narrow, int64_t threads) {
    Sizes n{batch, channels, pixels};
    if (narrow) gate_backward((const bf16*)grad, (const bf16*)x, weight, bias, mean, variance, (bf16*)dx, dweight,
                              dbias, n, eps, training, threads);
    else gate_backward((const float*)grad, (const float*)x, weight, bias, mean, variance, (float*)dx, dweight, dbias,
                       n, eps, training, threads);
}

void elu_forward(const void* x, void* y, int64_t count, int narrow, int64_t threads) {
    if (narrow) elu((const bf16*)x, (bf16*)y, count, threads);
    else elu((const float*)x, (float*)y, count, threads);
}

void elu_backward(const void* grad, const void* x, void* dx, int64_t count, int narrow, int64_t threads) {
    if (narrow) elu_gradient((const bf16*)grad, (const bf16*)x, (bf16*)dx, count, threads);
    else elu_gradient((const float*)grad, (const float*)x, (float*)dx, count, threads);
}

}
