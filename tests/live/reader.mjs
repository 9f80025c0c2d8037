// Reads the live weights of a run from Node: node reader.mjs RUN prints the step, and the sum of each tensor.
import { readFileSync } from "node:fs";
import { createHash } from "node:crypto";

const { segment } = JSON.parse(readFileSync(`${process.argv[2]}/live/weights.json`, "utf8"));
const file = readFileSync(`${segment}/weights.safetensors`);
const length = Number(file.readBigUInt64LE(0));
const { __metadata__: facts, ...tensors } = JSON.parse(file.subarray(8, 8 + length).toString("utf8"));
const block = file.subarray(8 + length);
if (createHash("sha256").update(block).digest("hex") !== facts.sha256) throw new Error("torn");
const sums = {};
for (const [name, { dtype, data_offsets: [begin, end] }] of Object.entries(tensors)) {
  let sum = 0;
  if (dtype === "F32") for (let at = begin; at < end; at += 4) sum += block.readFloatLE(at);
  else if (dtype === "I64") for (let at = begin; at < end; at += 8) sum += Number(block.readBigInt64LE(at));
  else throw new Error(`${name} is ${dtype}`);
  sums[name] = sum;
}
console.log(JSON.stringify({ step: Number(facts.step), sums }));
