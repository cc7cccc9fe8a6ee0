/* NRRD as this server and the panel exchange it: raw unsigned bytes on the lattice of a DICOM series. */

const TEXT_END = [10, 10]; // the blank line between header and voxels

/**
 * Read a raw NRRD.
 *
 * @param {ArrayBuffer} buffer
 * @returns {{sizes: number[], fields: Object<string, string>, voxels: Uint8Array}} x is fastest, then y, then slices
 */
export function readNrrd(buffer) {
  const bytes = new Uint8Array(buffer);
  const end = bytes.findIndex((byte, at) => byte === TEXT_END[0] && bytes[at + 1] === TEXT_END[1]);
  const lines = new TextDecoder().decode(bytes.subarray(0, Math.max(end, 0))).split('\n');
  if (!lines[0].startsWith('NRRD')) {
    throw new Error(
      'The server’s answer is not an NRRD image. Expected a header that starts with NRRD; look at the server’s log.'
    );
  }
  const fields = Object.fromEntries(
    lines
      .slice(1)
      .filter(line => line.includes(':') && !line.startsWith('#'))
      .map(splitField)
  );
  const sizes = (fields.sizes ?? '').trim().split(/\s+/).map(Number);
  const voxels = bytes.subarray(end + 2);
  if (!['uint8', 'uchar', 'unsigned char', 'uint8_t'].includes(fields.type) || fields.encoding !== 'raw') {
    throw new Error(`The server sent voxels as ${fields.type}, ${fields.encoding}; expected uint8, raw.`);
  }
  if (sizes.length !== 3 || voxels.length !== sizes[0] * sizes[1] * sizes[2]) {
    throw new Error(`The server sent ${voxels.length} voxels for a grid of ${sizes.join(' × ')}.`);
  }
  return { sizes, fields, voxels };
}

/**
 * Write a raw NRRD in DICOM's patient coordinates.
 *
 * @param {Uint8Array} voxels x is fastest, then y, then slices
 * @param {{sizes: number[], directions: number[][], origin: number[]}} grid in mm, LPS
 * @returns {Blob}
 */
export function writeNrrd(voxels, { sizes, directions, origin }) {
  const vector = values => `(${values.map(value => Number(value)).join(',')})`;
  const header = [
    'NRRD0004',
    'type: uint8',
    'dimension: 3',
    'space: left-posterior-superior',
    `sizes: ${sizes.join(' ')}`,
    `space directions: ${directions.map(vector).join(' ')}`,
    'kinds: domain domain domain',
    'endian: little',
    'encoding: raw',
    `space origin: ${vector(origin)}`,
  ].join('\n');
  return new Blob([`${header}\n\n`, voxels], { type: 'application/octet-stream' });
}

function splitField(line) {
  const at = line.indexOf(':');
  return [
    line.slice(0, at).trim(),
    line
      .slice(at + 1)
      .replace(/^=/, '')
      .trim(),
  ];
}
