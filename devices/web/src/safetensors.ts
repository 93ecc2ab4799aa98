// Files of tensors, in the safetensors format.

export type Dtype = "F32" | "F64" | "I64" | "I32" | "U8" | "BOOL";

export interface Stored {
  dtype: Dtype;
  shape: number[];
  bytes: Uint8Array;
}

/** Bytes of an element. */
export const SIZE: Record<Dtype, number> = { F32: 4, F64: 8, I64: 8, I32: 4, U8: 1, BOOL: 1 };

/** The tensors of a file. */
export function decode(content: Uint8Array): Map<string, Stored> {
  const size = Number(new DataView(content.buffer, content.byteOffset, 8).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(content.subarray(8, 8 + size))) as Record<
    string,
    { dtype: Dtype; shape: number[]; data_offsets: [number, number] }
  >;
  const found = new Map<string, Stored>();
  for (const [name, entry] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const [start, end] = entry.data_offsets;
    // A copy, since a typed array of floats has to begin at a multiple of its element's size.
    found.set(name, { dtype: entry.dtype, shape: entry.shape, bytes: content.slice(8 + size + start, 8 + size + end) });
  }
  return found;
}

/** float32 tensors and fields as a file. */
export function encode(
  tensors: Map<string, { shape: readonly number[]; data: Float32Array }>,
  fields: Record<string, unknown>,
): Uint8Array<ArrayBuffer> {
  const header: Record<string, unknown> = { __metadata__: { __fields__: JSON.stringify(fields) } };
  let offset = 0;
  for (const [name, { shape, data }] of tensors) {
    header[name] = { dtype: "F32", shape, data_offsets: [offset, offset + data.byteLength] };
    offset += data.byteLength;
  }
  let head = new TextEncoder().encode(JSON.stringify(header));
  const padded = new Uint8Array(Math.ceil(head.length / 8) * 8).fill(0x20);
  padded.set(head);
  head = padded;
  const file = new Uint8Array(8 + head.length + offset);
  new DataView(file.buffer).setBigUint64(0, BigInt(head.length), true);
  file.set(head, 8);
  let at = 8 + head.length;
  for (const { data } of tensors.values()) {
    file.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), at);
    at += data.byteLength;
  }
  return file;
}
