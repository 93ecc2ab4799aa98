// The page: it shows this device's digits, how far the federation is, and the loss. `#token=...&data=...` starts at once.

import { decode } from "./safetensors";
import type { Said, Start } from "./worker";

const find = <T extends Element>(selector: string): T => document.querySelector<T>(selector)!;
const given = new URLSearchParams(location.hash.slice(1)); // not sent to any server
history.replaceState(null, "", location.pathname); // nor kept in the address bar, where people see and copy it
const losses: number[] = [];

function showDigits(content: Uint8Array): number {
  const images = decode(content).get("0");
  if (!images) throw new Error("The file has no tensor 0.");
  const [count = 0, , height = 0, width = 0] = images.shape;
  const pixels = new Float32Array(images.bytes.buffer);
  const shown = find<HTMLElement>("#digits");
  shown.replaceChildren();
  for (let index = 0; index < Math.min(count, 20); index++) {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [width, height];
    const context = canvas.getContext("2d")!;
    const image = context.createImageData(width, height);
    for (let at = 0; at < width * height; at++) {
      image.data.set([16, 60, 120, 255 * pixels[index * width * height + at]!], 4 * at);
    }
    context.putImageData(image, 0, 0);
    shown.append(canvas);
  }
  return count;
}

function showLosses(rounds: number): void {
  const top = Math.max(...losses);
  const step = 550 / Math.max(rounds - 1, 1);
  const points = losses.map((loss, index) => `${(40 + index * step).toFixed(1)},${(150 - (140 * loss) / top).toFixed(1)}`);
  find("#curve").setAttribute("points", points.join(" "));
  find("#top").textContent = top.toFixed(2);
}

function show(said: Said): void {
  const status = find<HTMLElement>("#status");
  if (said.kind === "step") {
    status.textContent = `Training for round ${said.version + 1} of ${said.rounds}: step ${said.step}`;
  } else if (said.kind === "taken") {
    losses.push(said.loss);
    status.textContent = `The update for round ${said.version + 1} was taken; waiting for the others.`;
    find<HTMLProgressElement>("#rounds").value = (said.version + 1) / said.rounds;
    find("#loss").textContent = said.loss.toFixed(3);
    showLosses(said.rounds);
  } else if (said.kind === "over") {
    status.textContent = `The federation is over. ${said.taken} updates of this device are in its model.`;
    document.body.dataset["state"] = "over";
  } else {
    status.textContent = `Refused: ${said.reason}`;
    document.body.dataset["state"] = "error";
  }
}

async function start(token: string, data: Uint8Array<ArrayBuffer>): Promise<void> {
  find("#count").textContent = String(showDigits(data));
  document.body.dataset["state"] = "training";
  const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
  worker.onmessage = ({ data: said }: MessageEvent<Said>) => show(said);
  worker.onerror = (event) => show({ kind: "error", reason: event.message });
  const conditions = find<HTMLInputElement>("#charging").checked ? ["charging"] : [];
  worker.postMessage({ token, data, conditions } satisfies Start);
}

find<HTMLInputElement>("#token").value = given.get("token") ?? "";
find<HTMLFormElement>("form").onsubmit = async (event) => {
  event.preventDefault();
  const file = find<HTMLInputElement>("#file").files?.[0];
  if (file) await start(find<HTMLInputElement>("#token").value, new Uint8Array(await file.arrayBuffer()));
};
const url = given.get("data");
if (url && given.get("token")) {
  const answer = await fetch(url);
  await start(given.get("token")!, new Uint8Array(await answer.arrayBuffer()));
}
