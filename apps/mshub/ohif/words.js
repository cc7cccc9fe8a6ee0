/* How sure a model was of a label, how much of it a person changed, and how far a batch is: numbers as sentences. */

const UNSURE_BELOW = 0.8;
const UNSURE_AT_MOST = 3;
const WORST_AT_MOST = 6;
const PERCENT = 100;

/** What measures of agreement compare: their mean counts, and the last one only where the others are missing. */
const MEASURES = {
  fold_dice: 'the folds of the model with each other',
  mirror_dice: 'what the model finds in mirrored copies of the image',
};
const OWN_PROBABILITIES = 'the label with the probabilities it was made from';

const isKnown = value => typeof value === 'number';
const mean = values => values.reduce((sum, value) => sum + value, 0) / values.length;
const compared = measured => Object.keys(MEASURES).filter(name => isKnown(measured[name]));

/** The agreement of one structure, as the server has it for all; undefined where nothing was measured. */
function agreementOf(measured) {
  const names = compared(measured);
  return names.length ? mean(names.map(name => measured[name])) : (measured.soft_dice ?? undefined);
}
const worstFirst = (structures, most) => structures.sort(([, a], [, b]) => a - b).slice(0, most);
const named = structures => structures.map(([name, value]) => `${name} ${dice(value)}`).join(', ');

/** A Dice, 0 to 1, with two digits; never rounded up to a perfect one. */
export function dice(value) {
  const text = value.toFixed(2);
  return value < 1 && text === '1.00' ? 'above 0.99' : text;
}

/** A phrase of the server as a sentence. */
export const sentence = phrase => `${phrase[0].toUpperCase()}${phrase.slice(1)}${/[.?!]$/.test(phrase) ? '' : '.'}`;

/**
 * How sure a model was of a label.
 *
 * @param {{uncertainty: ?Object, expected_dice: ?Object}} facts of a prediction
 * @returns {?{text: string, title: string}} null where nothing was measured
 */
export function sureness({ uncertainty, expected_dice: expected }) {
  if (!uncertainty || agreementOf(uncertainty) === undefined) {
    return null;
  }
  const measures = compared(uncertainty).map(name => MEASURES[name]);
  const unsure = unsureStructures(uncertainty);
  const least = unsure.length ? `, least sure of ${unsure.map(([name]) => name).join(', ')}` : '';
  const agreement = `${expected ? `Agreement ${dice(uncertainty.agreement)}: c` : 'C'}ompares ${measures.join(', and ') || OWN_PROBABILITIES}`;
  return {
    text: `${expected ? expectedText(expected) : `Agreement ${dice(uncertainty.agreement)}`}${least}`,
    title: [
      expected ? expectedTitle(expected) : 'How far the model agrees with itself; no measured quality.',
      `${agreement} (mean Dice).`,
      unsure.length ? `Least sure of: ${named(unsure)}.` : null,
    ]
      .filter(Boolean)
      .join('\n'),
  };
}

function unsureStructures({ structures = {} }) {
  const agreements = Object.entries(structures).map(([name, measured]) => [name, agreementOf(measured)]);
  return worstFirst(
    agreements.filter(([, value]) => value < UNSURE_BELOW),
    UNSURE_AT_MOST
  );
}

const expectedText = ({ dice: value, low, high }) =>
  `Expected Dice ${value.toFixed(2)} (${low.toFixed(2)} to ${high.toFixed(2)})`;
const expectedTitle = ({ level, cases }) =>
  `Estimated from ${cases} reviewed cases: about ${Math.round(PERCENT * level)} % of results like this lie in the range.`;

/**
 * How much of the pre-label a person changed.
 *
 * @param {{dice: Object<string, number>, edited_voxels: number}} agreement of a submitted label with its pre-label
 * @returns {{text: string, title: string}}
 */
export function changes({ dice: found, edited_voxels: edited }) {
  if (!edited) {
    return { text: 'The same as the pre-label.', title: '' };
  }
  const structures = Object.entries(found);
  const values = structures.map(([, value]) => value);
  const voxels = edited === 1 ? '1 voxel' : `${edited.toLocaleString('en')} voxels`;
  const worst = worstFirst(
    structures.filter(([, value]) => value < 1),
    WORST_AT_MOST
  );
  return {
    text: `Changed ${voxels}${structures.length ? `; mean Dice with the pre-label ${dice(mean(values))}` : ''}.`,
    title: worst.length ? `Dice with the pre-label: ${named(worst)}` : '',
  };
}

/** How far a batch of pre-labels is; `state` is running, stopped or done. */
export function progress({ state, total, ended, counts }) {
  const begin = { stopped: `Stopped at ${ended} of ${total}`, done: `${counts.done} of ${total} prepared` }[state];
  return [
    begin ?? `${ended} of ${total}`,
    counts.failed ? `${counts.failed} failed` : null,
    counts.skipped ? `${counts.skipped} were ready` : null,
  ]
    .filter(Boolean)
    .join(', ');
}
