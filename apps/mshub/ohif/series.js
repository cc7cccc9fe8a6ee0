/* The series a viewport shows, and where its slices lie. Vectors are in mm, in DICOM's patient coordinates (LPS). */

const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
const cross = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
const scaled = (a, by) => a.map(value => value * by);
const minus = (a, b) => a.map((value, axis) => value - b[axis]);

const NOT_IMAGES = new Set(['SEG', 'RTSTRUCT', 'RTPLAN', 'RTDOSE', 'PR', 'SR', 'KO', 'DOC']);

/**
 * The image series of the active viewport; of a segmentation object, the series it was drawn on.
 *
 * @returns {?{uid, study, modality, description, number, slices, isVolume, displaySet}}
 */
export function activeSeries({ viewportGridService, displaySetService }) {
  const { activeViewportId, viewports } = viewportGridService.getState();
  const uids = viewports?.get(activeViewportId)?.displaySetInstanceUIDs ?? [];
  const shown = uids.map(uid => displaySetService.getDisplaySetByUID(uid)).filter(Boolean);
  const image = shown.find(set => !NOT_IMAGES.has(set.Modality)) ?? referenced(shown[0], displaySetService);
  return image ? describe(image) : null;
}

function referenced(displaySet, displaySetService) {
  const uid = displaySet?.referencedDisplaySetInstanceUID;
  return uid ? displaySetService.getDisplaySetByUID(uid) : undefined;
}

function describe(displaySet) {
  const images = displaySet.imageIds ?? displaySet.instances?.map(instance => instance.imageId) ?? [];
  return {
    uid: displaySet.SeriesInstanceUID,
    study: displaySet.StudyInstanceUID,
    modality: displaySet.Modality,
    description: displaySet.SeriesDescription || 'no description',
    number: displaySet.SeriesNumber,
    slices: images.length,
    isVolume: images.length > 1,
    displaySet,
  };
}

/**
 * Where the slices of `imageIds` lie.
 *
 * @param {string[]} imageIds
 * @returns {{order: number[], sizes: number[], directions: number[][], origin: number[]}} `order[k]` is the index in
 *   `imageIds` of slice k; slices ascend along the normal, rows × columns, which is how the server orders them
 */
export function gridOf(imageIds) {
  const planes = imageIds.map(imageId => window.cornerstone.metaData.get('imagePlaneModule', imageId));
  if (planes.length < 2 || planes.some(plane => !plane?.imagePositionPatient || !plane?.rowCosines)) {
    throw new Error(`This series has ${planes.length} slice(s), not all with a position; a volume is needed.`);
  }
  const [first] = planes;
  const [along, down] = [[...first.rowCosines], [...first.columnCosines]];
  const normal = cross(along, down);
  const height = plane => dot(plane.imagePositionPatient, normal);
  const order = planes.map((_, index) => index).sort((a, b) => height(planes[a]) - height(planes[b]));
  const bottom = [...planes[order[0]].imagePositionPatient];
  const top = [...planes[order[order.length - 1]].imagePositionPatient];
  return {
    order,
    sizes: [first.columns, first.rows, planes.length],
    directions: [
      scaled(along, first.columnPixelSpacing),
      scaled(down, first.rowPixelSpacing),
      scaled(minus(top, bottom), 1 / (planes.length - 1)),
    ],
    origin: bottom,
  };
}
