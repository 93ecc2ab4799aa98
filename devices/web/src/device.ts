// A device of a federation: it asks for tasks, trains with an ONNX runtime, and sends what has changed.

import * as ort from "onnxruntime-web/wasm";

import { batches, type Order } from "./batches";
import { decode, encode, SIZE, type Dtype, type Stored } from "./safetensors";

const PROTOCOL = 1;
const PATIENCE = 300_000; // milliseconds that the gateway may ask to wait
const DELTA = "delta\x1f"; // before the name of each tensor of an update
const KINDS: Record<Dtype, ort.Tensor.Type> = {
  F32: "float32",
  F64: "float64",
  I64: "int64",
  I32: "int32",
  U8: "uint8",
  BOOL: "bool",
};

export interface Task extends Order {
  task: string;
  rounds: number;
  lr: number;
  step_digest: string;
}

export interface Progress {
  task: Task;
  step: number;
  loss: number;
}

/** The gateway has refused a request. */
export class Refused extends Error {
  constructor(
    readonly status: number,
    readonly facts: { error?: string; kind?: string; digest?: string },
  ) {
    super(`${status}: ${facts.error ?? "no reason given"}`);
  }
}

export class Device {
  #session: { digest: string; session: ort.InferenceSession } | undefined;

  /**
   * @param address The gateway's; empty for the one that has served the page.
   * @param token What `lightning-fl gateway --enrol` has printed.
   * @param data The batch's tensors over all examples, by name.
   * @param conditions What holds for this device now.
   * @param onStep Called after each step.
   */
  constructor(
    readonly address: string,
    readonly token: string,
    readonly data: Map<string, Stored>,
    readonly conditions: string[],
    readonly onStep: (progress: Progress) => void = () => {},
  ) {}

  get numExamples(): number {
    return [...this.data.values()][0]?.shape[0] ?? 0;
  }

  /** Trains until the federation is over; returns how many updates were taken. */
  async run(onTaken: (task: Task, loss: number) => void = () => {}): Promise<number> {
    for (let taken = 0; ; ) {
      try {
        const task = await this.checkIn();
        if (!task) continue;
        const { update, loss, steps } = await this.train(task);
        const said = { version: task.version, num_examples: this.numExamples, num_steps: steps, loss };
        await this.send(task, encode(update, said));
        taken++;
        onTaken(task, loss);
      } catch (error) {
        if (!(error instanceof Refused)) throw error;
        if (error.facts.kind === "over") return taken;
        // Too late or too old: there is a newer task. Anything else stays refused.
        if (error.facts.kind !== "late" && error.facts.kind !== "stale") throw error;
      }
    }
  }

  async checkIn(): Promise<Task | undefined> {
    const body = JSON.stringify({ protocol: PROTOCOL, conditions: this.conditions });
    const answer = await this.#call("POST", "/v1/checkin", body);
    return answer.length ? (JSON.parse(new TextDecoder().decode(answer)) as Task) : undefined;
  }

  /** Trains from the task's model; returns the change of the parameters, and the mean loss. */
  async train(task: Task) {
    const session = await this.#step(task.step_digest);
    const start = new Map<string, { shape: number[]; data: Float32Array }>();
    for (const [name, own] of decode(await this.#call("GET", `/v1/models/${task.version}`))) {
      start.set(name, { shape: own.shape, data: new Float32Array(own.bytes.buffer) });
    }
    let feeds: Record<string, ort.Tensor> = {};
    for (const [name, { shape, data }] of start) {
      feeds[`parameter.${name}`] = new ort.Tensor("float32", data.slice(), shape);
    }
    for (const given of session.inputMetadata) {
      if (!given.name.startsWith("optimizer.") || !given.isTensor) continue;
      const shape = given.shape as number[];
      feeds[given.name] = new ort.Tensor("float32", new Float32Array(shape.reduce((a, b) => a * b, 1)), shape);
    }
    const lr = new ort.Tensor("float32", [task.lr], []);
    let [steps, total, seen] = [0, 0, 0];
    for await (const rows of batches(task, this.numExamples)) {
      const found = await session.run({ ...feeds, ...this.#batch(rows), lr });
      const loss = (found["loss"]!.data as Float32Array)[0]!;
      feeds = {};
      for (const [name, own] of Object.entries(found)) {
        if (name.startsWith("next.")) feeds[name.slice("next.".length)] = own;
      }
      [steps, total, seen] = [steps + 1, total + loss * rows.length, seen + rows.length];
      this.onStep({ task, step: steps, loss });
    }
    const update = new Map<string, { shape: number[]; data: Float32Array }>();
    for (const [name, { shape, data }] of start) {
      const after = feeds[`parameter.${name}`]!.data as Float32Array;
      update.set(DELTA + name, { shape, data: after.map((value, index) => value - data[index]!) });
    }
    return { update, loss: total / seen, steps };
  }

  /** Sends an update. If the answer is lost it is sent again, and counts once. */
  async send(task: Task, body: Uint8Array<ArrayBuffer>): Promise<void> {
    try {
      await this.#call("PUT", `/v1/updates?task=${task.task}`, body);
    } catch (error) {
      const isReplay = error instanceof Refused && error.facts.kind === "replay";
      if (!isReplay || error.facts.digest !== (await sha256(body))) throw error;
    }
  }

  #batch(rows: Uint32Array): Record<string, ort.Tensor> {
    const feeds: Record<string, ort.Tensor> = {};
    for (const [name, { dtype, shape, bytes }] of this.data) {
      const one = shape.slice(1);
      const size = one.reduce((a, b) => a * b, 1) * SIZE[dtype];
      const taken = new Uint8Array(rows.length * size);
      rows.forEach((row, index) => taken.set(bytes.subarray(row * size, (row + 1) * size), index * size));
      feeds[`batch.${name}`] = tensor(dtype, taken.buffer, [rows.length, ...one]);
    }
    return feeds;
  }

  async #step(digest: string): Promise<ort.InferenceSession> {
    if (this.#session?.digest !== digest) {
      const content = await this.#call("GET", "/v1/step");
      if ((await sha256(content)) !== digest) throw new Error("The training step is another one than the task names.");
      this.#session = { digest, session: await ort.InferenceSession.create(content) };
    }
    return this.#session.session;
  }

  async #call(method: string, path: string, body?: string | Uint8Array<ArrayBuffer>): Promise<Uint8Array<ArrayBuffer>> {
    for (let wait = 100; ; wait = Math.min(2 * wait, 10_000)) {
      try {
        const headers = { Authorization: `Bearer ${this.token}` };
        const answer = await fetch(this.address + path, { method, headers, body });
        if (answer.ok) return new Uint8Array(await answer.arrayBuffer());
        const facts = await answer.json().catch(() => ({}));
        const asked = 1000 * Number(answer.headers.get("Retry-After") ?? 0);
        if (![408, 429, 500, 502, 503, 504, 507].includes(answer.status) || asked > PATIENCE) {
          throw new Refused(answer.status, facts);
        }
        wait = Math.max(wait, asked || 0);
      } catch (error) {
        if (error instanceof Refused) throw error; // else it is not there, or was gone before it had answered
      }
      await new Promise((resolve) => setTimeout(resolve, wait * (1 + Math.random() / 2)));
    }
  }
}

function tensor(dtype: Dtype, buffer: ArrayBuffer, shape: number[]): ort.Tensor {
  switch (dtype) {
    case "F32":
      return new ort.Tensor("float32", new Float32Array(buffer), shape);
    case "F64":
      return new ort.Tensor("float64", new Float64Array(buffer), shape);
    case "I64":
      return new ort.Tensor("int64", new BigInt64Array(buffer), shape);
    case "I32":
      return new ort.Tensor("int32", new Int32Array(buffer), shape);
    default:
      return new ort.Tensor(KINDS[dtype] as "uint8" | "bool", new Uint8Array(buffer), shape);
  }
}

async function sha256(content: Uint8Array<ArrayBuffer>): Promise<string> {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
  return [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
