// Trains beside the page, which stays quick.

import * as ort from "onnxruntime-web/wasm";

import { Device } from "./device";
import { decode } from "./safetensors";

export interface Start {
  token: string;
  data: Uint8Array<ArrayBuffer>;
  conditions: string[];
}

export type Said =
  | { kind: "step"; version: number; rounds: number; step: number; loss: number }
  | { kind: "taken"; version: number; rounds: number; loss: number }
  | { kind: "over"; taken: number }
  | { kind: "error"; reason: string };

ort.env.wasm.numThreads = 1; // more need a page with headers for shared memory
ort.env.wasm.wasmPaths = new URL("./", self.location.href).href;
const say = (message: Said): void => self.postMessage(message);

self.onmessage = async ({ data: start }: MessageEvent<Start>): Promise<void> => {
  try {
    const device = new Device("", start.token, decode(start.data), start.conditions, ({ task, step, loss }) =>
      say({ kind: "step", version: task.version, rounds: task.rounds, step, loss }),
    );
    const taken = await device.run((task, loss) =>
      say({ kind: "taken", version: task.version, rounds: task.rounds, loss }),
    );
    say({ kind: "over", taken });
  } catch (error) {
    say({ kind: "error", reason: error instanceof Error ? error.message : String(error) });
  }
};
