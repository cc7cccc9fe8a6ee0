/* Labels between arrays and OHIF's labelmaps, slice by slice: no voxel is resampled on the way. */

import { readNrrd, writeNrrd } from './nrrd.js';
import { gridOf } from './series.js';

const LABELMAP = 'Labelmap';
const LARGEST_VALUE = 255;

/**
 * Show a label as an editable segmentation.
 *
 * @param {Object} services OHIF's services
 * @param {Object} series as `activeSeries` gives it
 * @param {?ArrayBuffer} nrrd on the series' own lattice; null for a label without a labelled voxel
 * @param {{title: string, names: Object<string, number>, colours: Object<string, number[]>}} look
 * @returns {Promise<{segmentationId: string, voxels: Uint8Array}>}
 */
export async function showLabel(services, series, nrrd, { title, names, colours = {} }) {
  const { segmentationService } = services;
  const { order, sizes } = gridOf(series.displaySet.imageIds);
  const voxels = nrrd ? voxelsOn(sizes, nrrd) : new Uint8Array(sizes[0] * sizes[1] * sizes[2]);
  const segmentationId = await segmentationService.createLabelmapForDisplaySet(series.displaySet, {
    label: freeTitle(segmentationService, title),
    segments: segmentsOf(names),
  });
  const slices = imagesOf(segmentationService.getSegmentation(segmentationId));
  const area = sizes[0] * sizes[1];
  order.forEach((image, slice) => {
    slices[image].voxelManager.getScalarData().set(voxels.subarray(slice * area, (slice + 1) * area));
  });
  await showInViewports(services, series, segmentationId);
  paint(services, segmentationId, names, colours);
  window.cornerstoneTools.segmentation.triggerSegmentationEvents.triggerSegmentationDataModified(segmentationId);
  goToLargest(services, series, { order, area, voxels });
  return { segmentationId, voxels };
}

/**
 * Read a segmentation back.
 *
 * @returns {{label: Blob, voxels: Uint8Array, segments: {name: string, idx: number}[]}} an NRRD, its voxels, its names
 */
export function readLabel(segmentation) {
  const layers = Object.keys(segmentation.representationData[LABELMAP]?.labelmaps ?? {});
  if (layers.length > 1) {
    throw new Error('The segments of this segmentation overlap; one voxel can have one label only. Merge them first.');
  }
  const images = imagesOf(segmentation);
  const grid = gridOf(images.map(image => image.referencedImageId));
  const area = grid.sizes[0] * grid.sizes[1];
  const voxels = new Uint8Array(area * grid.sizes[2]);
  grid.order.forEach((image, slice) => voxels.set(asBytes(images[image].voxelManager.getScalarData()), slice * area));
  const segments = Object.values(segmentation.segments)
    .filter(Boolean)
    .map(({ label, segmentIndex }) => ({ name: label, idx: Number(segmentIndex) }));
  return { label: writeNrrd(voxels, grid), voxels, segments };
}

/** The SeriesInstanceUID a segmentation was drawn on; undefined if it has no labelmap. */
export function seriesOf(segmentation) {
  const [image] = segmentation?.representationData?.[LABELMAP] ? imagesOf(segmentation) : [];
  return image && window.cornerstone.metaData.get('generalSeriesModule', image.referencedImageId)?.seriesInstanceUID;
}

/** The ids of segmentations that a viewport should show and has not drawn yet. */
export function undrawn({ cornerstoneViewportService, segmentationService }) {
  const isDrawn = (viewportId, segmentationId) => {
    const actors = cornerstoneViewportService.getCornerstoneViewport(viewportId)?.getActors?.() ?? [];
    return actors.some(({ representationUID }) => representationUID?.startsWith(segmentationId));
  };
  return segmentationService
    .getSegmentations()
    .map(({ segmentationId }) => segmentationId)
    .filter(id => segmentationService.getViewportIdsWithSegmentation(id).some(viewport => !isDrawn(viewport, id)));
}

/** A short number that differs, almost surely, where two labels differ (FNV-1a, 32 bits, four voxels at a time). */
export function fingerprint(voxels) {
  const { buffer, byteOffset, length } = voxels.byteOffset % 4 ? voxels.slice() : voxels;
  const words = length >> 2;
  let hash = 0x811c9dc5;
  for (const word of new Uint32Array(buffer, byteOffset, words)) {
    hash = Math.imul(hash ^ word, 0x01000193);
  }
  for (const voxel of voxels.subarray(4 * words)) {
    hash = Math.imul(hash ^ voxel, 0x01000193);
  }
  return hash >>> 0;
}

function voxelsOn(expected, nrrd) {
  const { sizes, voxels } = readNrrd(nrrd);
  if (sizes.some((size, axis) => size !== expected[axis])) {
    throw new Error(
      `The label has ${sizes.join(' × ')} voxels, the series ${expected.join(' × ')}: it belongs to another one.`
    );
  }
  return voxels;
}

function imagesOf(segmentation) {
  const { imageIds, volumeId } = segmentation.representationData[LABELMAP];
  const ids = imageIds ?? window.cornerstone.cache.getVolume(volumeId).imageIds;
  return ids.map(imageId => window.cornerstone.cache.getImage(imageId));
}

function asBytes(values) {
  if (!(values instanceof Uint8Array)) {
    const wrong = values.find(value => value < 0 || value > LARGEST_VALUE);
    if (wrong !== undefined) {
      throw new Error(`A voxel has the value ${wrong}; at most ${LARGEST_VALUE} segments can be submitted.`);
    }
  }
  return values;
}

function segmentsOf(names) {
  const entries = Object.entries(names).sort(([, a], [, b]) => a - b);
  return Object.fromEntries(
    entries.map(([label, segmentIndex], at) => [
      segmentIndex,
      { segmentIndex, label, active: at === 0, locked: false, cachedStats: {} },
    ])
  );
}

function freeTitle(segmentationService, title) {
  const taken = new Set(segmentationService.getSegmentations().map(({ label }) => label));
  let free = title;
  for (let number = 2; taken.has(free); number += 1) {
    free = `${title} (${number})`;
  }
  return free;
}

async function showInViewports({ segmentationService, viewportGridService }, series, segmentationId) {
  const { activeViewportId, viewports } = viewportGridService.getState();
  const showing = [...viewports.values()]
    .filter(({ displaySetInstanceUIDs }) => displaySetInstanceUIDs?.includes(series.displaySet.displaySetInstanceUID))
    .map(({ viewportId }) => viewportId);
  for (const viewportId of showing.includes(activeViewportId) ? showing : [activeViewportId, ...showing]) {
    await segmentationService.addSegmentationRepresentation(viewportId, { segmentationId, type: LABELMAP });
    segmentationService.setActiveSegmentation(viewportId, segmentationId);
  }
}

function paint({ segmentationService }, segmentationId, names, colours) {
  for (const viewportId of segmentationService.getViewportIdsWithSegmentation(segmentationId)) {
    for (const [name, index] of Object.entries(names)) {
      if (colours[name]) {
        segmentationService.setSegmentColor(viewportId, segmentationId, index, [...colours[name], 255]);
      }
    }
  }
}

/** Go to the slice with the most labelled voxels where the slice on the screen has none. */
function goToLargest({ cornerstoneViewportService, viewportGridService }, series, { order, area, voxels }) {
  const viewport = cornerstoneViewportService.getCornerstoneViewport(viewportGridService.getActiveViewportId());
  const counts = order.map((_, slice) =>
    voxels.subarray(slice * area, (slice + 1) * area).reduce((n, v) => n + (v > 0), 0)
  );
  const largest = Math.max(...counts);
  const current = series.displaySet.imageIds.indexOf(viewport?.getCurrentImageId?.());
  if (largest === 0 || current < 0 || counts[order.indexOf(current)] > 0) {
    return;
  }
  window.cornerstone.utilities.jumpToSlice(viewport.element, { imageIndex: order[counts.indexOf(largest)] });
}
