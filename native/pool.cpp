// Threads. Where torch's OpenMP runtime is loaded we borrow its threads (GOMP_parallel, found at run time: nothing is linked), so
// that the cores are not fought over; elsewhere, and in forked children, whose OpenMP threads are gone, our own pool works.
// The pool is never torn down: joining threads from a static destructor can hang the interpreter's exit.
#include "pool.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <new>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#define SL_PUBLIC extern "C" __attribute__((visibility("default")))

namespace {

typedef void (*GompParallel)(void (*)(void*), void*, unsigned, unsigned);

// Below this much work, waking threads costs more than it saves.
constexpr double SERIAL_US = 100;
constexpr int MAX_WORKERS = 255;

struct Job {
    void (*run)(void*, int64_t);
    void* context;
    int64_t tasks;
    int64_t next;
};

// Denormals are slow on many machines (a decaying state passes through them) and mean nothing here: treat them as zero.
struct FlushDenormals {
#if defined(__SSE2__)
    unsigned saved = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(saved | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(saved); }
#elif defined(__aarch64__)
    uint64_t saved;
    FlushDenormals() {
        __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
        __asm__ volatile("msr fpcr, %0" ::"r"(saved | (1ull << 24)));
    }
    ~FlushDenormals() { __asm__ volatile("msr fpcr, %0" ::"r"(saved)); }
#endif
};

void drain(void* data) {
    Job* job = static_cast<Job*>(data);
    FlushDenormals flush;
    for (;;) {
        const int64_t task = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (task >= job->tasks) return;
        job->run(job->context, task);
    }
}

struct Pool {
    pthread_mutex_t callers = PTHREAD_MUTEX_INITIALIZER;  // one parallel call at a time; others run on their own thread
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
    pthread_cond_t done = PTHREAD_COND_INITIALIZER;
    Job* job = nullptr;
    uint64_t round = 0;  // counts jobs, so that a worker takes each once
    int wanted = 0;      // workers still to join the current job
    int busy = 0;        // workers in the current job
    int workers = 0;
};

Pool* fresh_pool() {
    void* memory = malloc(sizeof(Pool));
    if (!memory) abort();
    return new (memory) Pool;
}

Pool* pool = nullptr;  // leaked on purpose
bool forked = false;
bool own_threads = false;
GompParallel gomp = nullptr;
bool gomp_searched = false;

void* work(void*) {
    uint64_t seen = 0;
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (pool->round == seen || pool->wanted == 0) {
            seen = pool->round;
            pthread_cond_wait(&pool->wake, &pool->lock);
        }
        seen = pool->round;
        pool->wanted--;
        pool->busy++;
        Job* job = pool->job;
        pthread_mutex_unlock(&pool->lock);
        drain(job);
        pthread_mutex_lock(&pool->lock);
        if (--pool->busy == 0) pthread_cond_signal(&pool->done);
    }
    return nullptr;
}

// The child of a fork has one thread and whatever state the locks were in: start afresh (the old pool is leaked).
void after_fork() {
    pool = fresh_pool();
    forked = true;
}

// At load, not at the first call: a child may be forked in between, by a parent whose OpenMP threads it will not have.
__attribute__((constructor)) void start() {
    pool = fresh_pool();
    pthread_atfork(nullptr, nullptr, after_fork);
}

void run_on_pool(Job* job, int64_t threads) {
    pthread_mutex_lock(&pool->lock);
    while (pool->workers < threads - 1 && pool->workers < MAX_WORKERS) {
        pthread_t thread;
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        const int failed = pthread_create(&thread, &attributes, work, nullptr);
        pthread_attr_destroy(&attributes);
        if (failed) break;  // fewer threads do the same work
        pool->workers++;
    }
    pool->job = job;
    pool->round++;
    pool->wanted = threads - 1 < pool->workers ? int(threads - 1) : pool->workers;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    drain(job);
    pthread_mutex_lock(&pool->lock);
    pool->wanted = 0;  // nobody new may start on a job whose memory is about to go
    while (pool->busy) pthread_cond_wait(&pool->done, &pool->lock);
    pool->job = nullptr;
    pthread_mutex_unlock(&pool->lock);
}

struct Scratch {
    void* memory;
    size_t bytes;
};
thread_local Scratch scratch = {nullptr, 0};
pthread_key_t scratch_key;
pthread_once_t scratch_once = PTHREAD_ONCE_INIT;
void make_key() { pthread_key_create(&scratch_key, free); }

}  // namespace

void sl_parallel(int64_t tasks, int64_t threads, double cost_us, void (*run)(void*, int64_t), void* context) {
    Job job = {run, context, tasks, 0};
    if (threads > tasks) threads = tasks;
    if (threads <= 1 || cost_us < SERIAL_US || pthread_mutex_trylock(&pool->callers)) return drain(&job);
    if (!gomp && !gomp_searched) {
        gomp = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        gomp_searched = true;
    }
    if (gomp && !forked && !own_threads)
        gomp(drain, &job, unsigned(threads), 0);
    else
        run_on_pool(&job, threads);
    pthread_mutex_unlock(&pool->callers);
}

void* sl_scratch(size_t bytes) {
    if (bytes <= scratch.bytes) return scratch.memory;
    pthread_once(&scratch_once, make_key);
    free(scratch.memory);
    scratch = {nullptr, 0};
    bytes = (bytes + 4095) / 4096 * 4096;
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes)) memory = nullptr;
    pthread_setspecific(scratch_key, memory);
    if (memory) scratch = {memory, bytes};
    return memory;
}

// Asks for large pages under memory that was not touched yet: weights that are read once a token otherwise spend a tenth of the time
// on looking up pages. A refusal changes nothing but speed.
SL_PUBLIC void sl_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 4096, start = ((uintptr_t)memory + page - 1) / page * page, end = ((uintptr_t)memory + bytes) / page * page;
    if (end > start) madvise((void*)start, end - start, MADV_HUGEPAGE);
#endif
}

// Hands over the address of GOMP_parallel where the loader's global scope does not show it.
SL_PUBLIC void sl_use_gomp(void* address) { gomp = reinterpret_cast<GompParallel>(address); }
// 1: our own threads even where OpenMP is loaded (for tests). 0: back to the default.
SL_PUBLIC void sl_use_own_threads(int yes) { own_threads = yes; }
// Which threads a parallel call would use: "openmp" or "own".
SL_PUBLIC const char* sl_threads() {
    if (!gomp && !gomp_searched) gomp = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return gomp && !forked && !own_threads ? "openmp" : "own";
}
