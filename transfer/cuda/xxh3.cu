// xxh3-128 of blocks that lie in device memory in several runs, by the default secret and seed 0.
//
// The hash adds up what the 16 stripes of each round of 1024 bytes come to, and scrambles the sum before the next
// round. Only the scrambling depends on what went before: so `add_rounds` adds up all rounds side by side, and `chain`
// does the rest, in one short step a round. Layouts and constants are in device_checksum.py, which puts the constants
// before this text: SECRET, LAST, LOW, HIGH, START.

typedef unsigned long long u64;

struct Run { u64 address, offset, nbytes; };        // bytes [offset, offset + nbytes) of the block, at address
struct Subject { u64 first_run, runs, nbytes, at; };  // one block; `at` is where its rounds begin in `sums`

#define ROUND 1024
#define STRIPE 64
#define LANES 8
#define AHEAD 16

#define PRIME32_1 0x9E3779B1ULL
#define PRIME64_1 0x9E3779B185EBCA87ULL
#define PRIME64_2 0xC2B2AE3D27D4EB4FULL

__device__ static const Run *run_at(const Run *runs, u64 count, u64 offset) {
    for (u64 number = 0; number < count; number++)
        if (offset - runs[number].offset < runs[number].nbytes) return runs + number;
    return 0;
}

// Eight bytes of the block; between tensors they are zeros.
__device__ static u64 word_at(const Run *runs, u64 count, u64 offset) {
    const Run *run = run_at(runs, count, offset);
    return run ? *(const u64 *)(run->address + (offset - run->offset)) : 0;
}

__device__ static u64 product(u64 word, u64 key) {
    u64 keyed = word ^ key;
    return (keyed & 0xFFFFFFFFULL) * (keyed >> 32);
}

// One warp a round: its threads take turns at the 128 words, always of the same lane.
extern "C" __global__ void add_rounds(const Subject *subjects, const Run *all_runs, u64 *sums) {
    const Subject subject = subjects[blockIdx.y];
    const Run *runs = all_runs + subject.first_run;
    const u64 full = (subject.nbytes - 1) / ROUND;
    const unsigned thread = threadIdx.x % 32, lane = thread % LANES;
    const u64 warps = (u64)gridDim.x * blockDim.x / 32;
    for (u64 round = ((u64)blockIdx.x * blockDim.x + threadIdx.x) / 32; round <= full; round += warps) {
        const u64 start = round * ROUND;
        const unsigned stripes = round < full ? ROUND / STRIPE : (unsigned)((subject.nbytes - 1 - start) / STRIPE);
        const Run *run = run_at(runs, subject.runs, start);
        const bool is_whole = run && start + ROUND <= run->offset + run->nbytes;
        const u64 *words = is_whole ? (const u64 *)(run->address + (start - run->offset)) : 0;
        u64 products = 0, plain = 0;
#pragma unroll
        for (unsigned part = 0; part < 4; part++) {
            const unsigned index = thread + 32 * part, stripe = index / LANES;
            if (stripe >= stripes) continue;
            const u64 word = is_whole ? words[index] : word_at(runs, subject.runs, start + 8 * index);
            products += product(word, SECRET[stripe + lane]);
            plain += word;
        }
        if (round == full && thread < LANES) {
            const u64 word = word_at(runs, subject.runs, subject.nbytes - STRIPE + 8 * thread);
            products += product(word, LAST[thread]);
            plain += word;
        }
        u64 sum = products + __shfl_xor_sync(0xFFFFFFFF, plain, 1);
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, 8);
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, 16);
        if (thread < LANES) sums[(subject.at + round) * LANES + thread] = sum;
    }
}

__device__ static u64 scramble(u64 sum, u64 key) { return (sum ^ (sum >> 47) ^ key) * PRIME32_1; }

__device__ static u64 merge(const u64 *sums, const u64 *keys, u64 merged) {
    for (unsigned lane = 0; lane < LANES; lane += 2) {
        const u64 one = sums[lane] ^ keys[lane], other = sums[lane + 1] ^ keys[lane + 1];
        merged += (one * other) ^ __umul64hi(one, other);
    }
    merged ^= merged >> 37;
    merged *= 0x165667919E3779F9ULL;
    return merged ^ (merged >> 32);
}

// Eight threads a block, one a lane; the sums of the next AHEAD rounds are fetched while these are chained.
extern "C" __global__ void chain(const Subject *subjects, const u64 *all_sums, u64 *digests) {
    __shared__ u64 merging[LANES];
    const Subject subject = subjects[blockIdx.x];
    const unsigned lane = threadIdx.x;
    const u64 *sums = all_sums + subject.at * LANES + lane;
    const u64 full = (subject.nbytes - 1) / ROUND, key = SECRET[ROUND / STRIPE + lane];
    u64 sum = START[lane], next[AHEAD], round = 0;
#pragma unroll
    for (unsigned ahead = 0; ahead < AHEAD; ahead++) next[ahead] = ahead < full ? sums[ahead * LANES] : 0;
    for (; round + AHEAD <= full; round += AHEAD) {
        u64 now[AHEAD];
#pragma unroll
        for (unsigned ahead = 0; ahead < AHEAD; ahead++) {
            const u64 later = round + AHEAD + ahead;
            now[ahead] = next[ahead];
            next[ahead] = later < full ? sums[later * LANES] : 0;
        }
#pragma unroll
        for (unsigned ahead = 0; ahead < AHEAD; ahead++) sum = scramble(sum + now[ahead], key);
    }
    for (unsigned ahead = 0; ahead < AHEAD; ahead++)
        if (round + ahead < full) sum = scramble(sum + next[ahead], key);
    merging[lane] = sum + sums[full * LANES];
    __syncthreads();
    if (lane) return;
    digests[2 * blockIdx.x] = merge(merging, HIGH, ~(subject.nbytes * PRIME64_2));
    digests[2 * blockIdx.x + 1] = merge(merging, LOW, subject.nbytes * PRIME64_1);
}
