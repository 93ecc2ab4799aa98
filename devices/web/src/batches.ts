// Which examples each step takes; the same in devices/python.

export interface Order {
  batch_size: number;
  epochs: number;
  steps: number | null;
  shuffle: boolean;
  seed: number;
  version: number;
  device: string;
}

/** The rows of each step's batch. */
export async function* batches(task: Order, count: number): AsyncGenerator<Uint32Array> {
  let left = task.steps ?? Math.ceil(count / task.batch_size) * task.epochs;
  for (let epoch = 0; left > 0; epoch++) {
    const words = `${task.seed}/${task.version}/${task.device}/${epoch}`;
    const rows = task.shuffle ? await shuffled(count, words) : Uint32Array.from({ length: count }, (_, row) => row);
    for (let start = 0; start < count && left > 0; start += task.batch_size, left--) {
      yield rows.subarray(start, start + task.batch_size);
    }
  }
}

/** An order of rows that depends on the words only: numbers of mulberry32, the order of Fisher and Yates. */
export async function shuffled(count: number, words: string): Promise<Uint32Array> {
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(words));
  let state = new DataView(digest).getInt32(0, true);
  const rows = Uint32Array.from({ length: count }, (_, row) => row);
  for (let last = count - 1; last > 0; last--) {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    const other = Math.floor((((t ^ (t >>> 14)) >>> 0) / 4294967296) * (last + 1));
    [rows[last], rows[other]] = [rows[other]!, rows[last]!];
  }
  return rows;
}
