/*
 * OHIF 3.13.2 takes the first letter of VOILUTFunction (0028,1056), "L" of "LINEAR", for the function, and then refuses
 * to window the image: every series that states the attribute is too bright, with an error on the screen. Without the
 * attribute OHIF windows linearly, which is what the attribute says almost always; so it is not told.
 */

const PRIORITY = 100_000; // before OHIF's own providers

export function windowLinearly(metaData) {
  let isAsking = false;
  metaData.addProvider((type, imageId) => {
    if (type !== 'voiLutModule' || isAsking) {
      return undefined;
    }
    isAsking = true;
    try {
      const found = metaData.get(type, imageId);
      return found && { ...found, voiLUTFunction: undefined };
    } finally {
      isAsking = false;
    }
  }, PRIORITY);
}
