// Compresses an ONNX model through a server, from Node.
//
//   cd examples/node && npm install
//   node compress.js ../mnist/model.onnx optimized.onnx [localhost:50051]
//
// COMPRESS_TOKEN: the token, where the server asks for one (over TLS: see grpc.credentials.createSsl).

import { createHash, randomUUID } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";
import { basename } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [modelPath, outputPath, address = "localhost:50051"] = process.argv.slice(2);
const PARENT = "projects/default";
const CHUNK_BYTES = 1024 * 1024;

const protos = process.env.MODELPRESS_PROTOS ?? fileURLToPath(new URL("../../protos", import.meta.url));
const names = ["upload", "model", "job"].map((name) => `modelpress_protos/v1/${name}_service.proto`);
const { modelpress } = grpc.loadPackageDefinition(
  loader.loadSync(names, {
    includeDirs: [protos, `${protos}/modelpress_protos/third_party`],
    keepCase: true,
    longs: Number,
    enums: String,
    defaults: true,
    oneofs: true,
  }),
);
const credentials = grpc.credentials.createInsecure();
const uploads = new modelpress.v1.UploadService(address, credentials);
const models = new modelpress.v1.ModelService(address, credentials);
const jobs = new modelpress.v1.JobService(address, credentials);
const metadata = new grpc.Metadata();
if (process.env.COMPRESS_TOKEN) metadata.set("authorization", `Bearer ${process.env.COMPRESS_TOKEN}`);

const call = (client, method, request) => promisify(client[method].bind(client))(request, metadata);

// CRC-32C (Castagnoli), bit by bit of a table.
const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  for (let bit = 0; bit < 8; bit++) byte = byte & 1 ? (byte >>> 1) ^ 0x82f63b78 : byte >>> 1;
  return byte >>> 0;
});
const crc32c = (data) => {
  let crc = 0xffffffff;
  for (const byte of data) crc = CRC_TABLE[(crc ^ byte) & 0xff] ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
};

async function upload(content) {
  const digest = { sha256: createHash("sha256").update(content).digest(), size_bytes: content.length };
  const { missing } = await call(uploads, "findMissingBlobs", { parent: PARENT, digests: [digest] });
  if (missing.length === 0) return digest; // it is there already
  const { name, committed_size } = await call(uploads, "createUpload", { parent: PARENT, digest });
  const stream = uploads.writeUpload(metadata);
  const answered = new Promise((resolve, reject) => {
    stream.on("data", () => {}).on("end", resolve).on("error", reject);
  });
  for (let offset = committed_size, first = true; first || offset < content.length; first = false) {
    const data = content.subarray(offset, offset + CHUNK_BYTES);
    const finish_write = offset + data.length >= content.length;
    stream.write({ name: first ? name : "", write_offset: offset, data, crc32c: crc32c(data), finish_write });
    offset += data.length;
  }
  stream.end();
  await answered;
  return digest;
}

async function download(digest) {
  const parts = [];
  for await (const { data, crc32c: sum } of uploads.readBlob({ parent: PARENT, digest }, metadata)) {
    if (crc32c(data) !== sum) throw new Error("a part came damaged");
    parts.push(data);
  }
  const content = Buffer.concat(parts);
  const found = createHash("sha256").update(content).digest();
  if (!found.equals(digest.sha256)) throw new Error("the file came damaged");
  return content;
}

const digest = await upload(readFileSync(modelPath));
const model = await call(models, "createModel", {
  parent: PARENT,
  model: { files: [{ path: basename(modelPath), digest }] },
  request_id: randomUUID(), // so that a retry makes no second one
});
let job = await call(jobs, "createJob", {
  parent: PARENT,
  job: { spec: { model: model.name } },
  request_id: randomUUID(),
});
for await (const { event, snapshot, progress } of jobs.watchJob({ name: job.name }, metadata)) {
  if (event === "snapshot") job = snapshot;
  if (event === "progress") console.log(`${Math.floor(progress.fraction * 100)} %`, progress.stage, progress.message);
}
if (job.state !== "JOB_STATE_SUCCEEDED") throw new Error(`${job.state}: ${job.error?.message ?? ""}`);
const result = job.artifacts.find((artifact) => artifact.kind === "KIND_OPTIMIZED_MODEL");
writeFileSync(outputPath, await download(result.files[0].digest));
const { original_size_bytes: before, optimized_size_bytes: after } = job.summary;
console.log(`${outputPath}: ${(before / after).toFixed(2)} times smaller`);
process.exit(0);
