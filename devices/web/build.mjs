// Bundles the page and its worker into dist/, with the runtime beside them, so that nothing is loaded from elsewhere.
import { build } from "esbuild";
import { copyFile, mkdir } from "node:fs/promises";

const runtime = "node_modules/onnxruntime-web/dist";
await mkdir("dist", { recursive: true });
await build({
  entryPoints: ["src/main.ts", "src/worker.ts"],
  outdir: "dist",
  bundle: true,
  format: "esm",
  minify: true,
  // The build of the runtime that knows the CPU only; it finds its file of WebAssembly by `wasmPaths`.
  conditions: ["onnxruntime-web-use-extern-wasm"],
  target: "es2022",
});
for (const file of ["ort-wasm-simd-threaded.wasm", "ort-wasm-simd-threaded.mjs"]) {
  await copyFile(`${runtime}/${file}`, `dist/${file}`);
}
await copyFile("index.html", "dist/index.html");
