/* Below OHIF's segments: what became of the result; always in sight, submitting and the next case. */

import { NAMED_AT_MOST, bar, button, duration, heading, link, moment, muted } from './controls.js';
import { element } from './dom.js';
import { Panel } from './panel.js';
import { exportAddress } from './server.js';
import { changes, progress } from './words.js';
import { storedIn, titleOf, workbench } from './workbench.js';

/** The strategies as orders of cases; one that is not among them is shown by its own name. */
const ORDERS = {
  random: 'Random',
  first: 'First of the list',
  uncertainty: 'Least sure first',
  class_stratified: 'Structures in turn',
  diversity: 'Most different first',
  hybrid: 'Unsure and different',
  worst_first: 'Likely failures first',
  relabel: 'Doubtful labels',
};
const orderOf = strategy => ORDERS[strategy] ?? spoken(strategy);
const spoken = name => name.replace(/^mshub[_-]/, '').replaceAll(/[_-]/g, ' ');

const draft = [
  bench => bench.draft() && { title: bench.draft().title, at: moment(bench.draft().at) },
  shown =>
    shown &&
    element(
      'div',
      { class: 'mshub-banner', 'data-cy': 'mshub-draft' },
      `${shown.title}: your changes of ${shown.at} were not submitted.`,
      button('draft-restore', 'Go on with them', { act: () => workbench.restoreDraft(), look: 'mshub-primary' }),
      button('draft-drop', 'Discard', { act: () => workbench.dropDraft() })
    ),
];

const submit = [
  bench => ({
    reviewer: bench.reviewer,
    reason: bench.reasonNotToSubmit(),
    isSending: bench.submitting,
    segmentation: bench.active()?.label ?? null,
    isTouched: Boolean(bench.records.get(bench.active()?.segmentationId)?.touched),
    submitted: bench.submission && moment(bench.submission.at),
  }),
  ({ reviewer, reason, isSending, segmentation, isTouched, submitted }) => [
    element(
      'div',
      { class: 'mshub-row' },
      element('input', {
        type: 'text',
        value: reviewer,
        placeholder: 'Your name',
        'aria-label': 'Your name, kept with the label',
        title: 'Your name, kept with the label',
        'data-cy': 'mshub-reviewer',
        onchange: event => workbench.setReviewer(event.target.value),
      }),
      button('submit', isSending ? 'Sending …' : 'Submit', {
        look: 'mshub-primary',
        act: () => workbench.submit(),
        reason,
        title: `Store ${segmentation} on the server and in the PACS (Shift+S)`,
      })
    ),
    element(
      'p',
      { class: 'mshub-note mshub-cut', 'data-cy': 'mshub-state' },
      stateOf({ segmentation, isTouched, submitted })
    ),
  ],
];

function stateOf({ segmentation, isTouched, submitted }) {
  if (!segmentation) {
    return 'Nothing to submit yet';
  }
  return isTouched
    ? `${segmentation}: changes not submitted`
    : submitted
      ? `Submitted ${submitted}`
      : `${segmentation}: not submitted`;
}

const submission = [
  bench => bench.submission && { ...bench.submission, at: moment(bench.submission.at) },
  shown => {
    if (!shown) {
      return null;
    }
    const { pacs, doubts = [], hints = [], agreement, unchanged, at, reviewed = [] } = shown;
    const changed = agreement && !(unchanged && !agreement.edited_voxels) ? changes(agreement) : null;
    return element(
      'div',
      { class: 'mshub-note', role: 'status', 'data-cy': 'mshub-submitted' },
      element('b', {}, `Submitted ${at}${unchanged ? ', unchanged' : ''}.`),
      reviewed.length ? element('span', { class: 'mshub-block' }, `Reviewed: ${reviewedText(reviewed)}.`) : null,
      changed
        ? element('span', { class: 'mshub-block', title: changed.title, 'data-cy': 'mshub-changes' }, changed.text)
        : null,
      element(
        'span',
        { class: `mshub-block${pacs?.stored === false ? ' mshub-warning' : ''}`, 'data-cy': 'mshub-pacs' },
        storedIn(pacs)
      ),
      doubts.length
        ? element(
            'ul',
            { class: 'mshub-warning', 'data-cy': 'mshub-doubts' },
            doubts.map(doubt => element('li', {}, doubt))
          )
        : null,
      hints.length
        ? element(
            'div',
            { 'data-cy': 'mshub-hints' },
            'May be unfinished:',
            element(
              'ul',
              {},
              hints.map(hint => element('li', {}, hint))
            )
          )
        : null
    );
  },
];

const reviewedText = names => (names.length > NAMED_AT_MOST ? `${names.length} structures` : names.join(', '));

const labels = [
  ({ tags, series }) => tags.final && series && { ...tags.final, uid: series.uid },
  shown =>
    shown &&
    element(
      'div',
      { class: 'mshub-labels', 'data-cy': 'mshub-labels' },
      muted(`Label on the server: ${[shown.client_id, moment(shown.ts)].filter(Boolean).join(', ')}`),
      element(
        'div',
        { class: 'mshub-row' },
        button('load', 'Show', {
          act: () => workbench.loadSubmitted(),
          title: 'Show the submitted label as a segmentation',
        }),
        link('export-seg', 'DICOM SEG', exportAddress(shown.uid, 'seg'), {
          download: '',
          title: 'Download as DICOM SEG',
        }),
        link('export-rtstruct', 'RTSTRUCT', exportAddress(shown.uid, 'rtstruct'), {
          download: '',
          title: 'Download as RTSTRUCT',
        })
      )
    ),
];

const leftOut = [
  bench => bench.leftOut,
  shown =>
    shown.length > 0 &&
    element(
      'details',
      { class: 'mshub-labels', 'data-cy': 'mshub-left-out' },
      element('summary', {}, `${shown.length} DICOM SEG of this series in the PACS not taken as a label`),
      element(
        'ul',
        { class: 'mshub-note' },
        shown.map(({ reason }) => element('li', {}, reason))
      )
    ),
];

const next = [
  bench => ({
    strategies: Object.entries(bench.information?.strategies ?? {}).map(([name, { description }]) => ({
      name,
      description,
    })),
    strategy: bench.strategy,
    isAsking: bench.findingNext,
    suggestion: bench.suggestion?.SeriesInstanceUID === bench.series?.uid ? bench.suggestion : null,
    advice: bench.advice?.model === bench.model ? bench.advice?.text : null,
  }),
  ({ strategies, strategy, isAsking, suggestion, advice }) =>
    strategies.length > 0 && [
      element(
        'div',
        { class: 'mshub-row' },
        element(
          'select',
          {
            'aria-label': 'How the next case is chosen',
            title: strategies.find(({ name }) => name === strategy)?.description,
            'data-cy': 'mshub-strategy',
            onchange: event => workbench.setStrategy(event.target.value),
          },
          strategies.map(({ name, description }) =>
            element('option', { value: name, selected: name === strategy, title: description }, orderOf(name))
          )
        ),
        button('next', isAsking ? 'Asking …' : 'Next case', {
          act: () => workbench.next(),
          reason: isAsking ? 'The server is choosing a case.' : null,
          title: 'Open the next case (Shift+N)',
        })
      ),
      suggestion?.audit ? audit() : null,
      suggestion?.why
        ? element('p', { class: 'mshub-note', 'data-cy': 'mshub-why' }, `Why this case: ${suggestion.why}`)
        : null,
      advice ? adviceOf(advice) : null,
    ],
];

let adviceIsOpen = true;

const adviceOf = text =>
  element(
    'details',
    { open: adviceIsOpen, 'data-cy': 'mshub-hint' },
    element('summary', { onclick: () => (adviceIsOpen = !adviceIsOpen) }, 'Before you label more'),
    element('p', { class: 'mshub-note mshub-advice' }, withOrders(text))
  );

/** What the server says of strategies, with their names as they are in the list. */
const withOrders = text => text.replaceAll(/strategy (\w+)/g, (_, name) => `strategy “${orderOf(name)}”`);

const audit = () =>
  element(
    'p',
    {
      class: 'mshub-note',
      title: 'New versions may be judged by this case, as it was not chosen for what the model makes of it.',
      'data-cy': 'mshub-audit',
    },
    element('span', { class: 'mshub-mark' }, 'Random case for the hold-out')
  );

let failuresAreOpen = false;

const preparation = [
  bench => {
    const { batches, limit } = bench.preparation;
    return (
      batches && {
        limit,
        batch: bench.preparation.batch(),
        reason: bench.preparation.reasonNotToStart(),
        order: orderOf(bench.strategy ?? ''),
        title: bench.chosen() && titleOf(bench.chosen()),
      }
    );
  },
  shown =>
    shown && [
      heading('Prepare cases'),
      shown.batch?.state === 'running' ? null : preparationStart(shown),
      shown.batch ? preparationProgress(shown.batch) : null,
    ],
];

const preparationStart = ({ limit, reason, order, title }) =>
  element(
    'div',
    { class: 'mshub-row' },
    element(
      'label',
      { class: 'mshub-count' },
      element('input', {
        type: 'number',
        min: 1,
        step: 1,
        value: limit,
        'data-cy': 'mshub-prepare-limit',
        onchange: ({ target }) => (target.value = workbench.preparation.setLimit(target.value)),
      }),
      ' cases'
    ),
    button('prepare', 'Prepare', {
      act: () => workbench.preparation.start(),
      reason,
      title: `Let ${title} segment the first cases by “${order}” while nobody waits for the server`,
    })
  );

function preparationProgress(batch) {
  const [isRunning, isStopped] = [batch.state === 'running', batch.state === 'stopped'];
  return element(
    'div',
    { class: 'mshub-progress', role: 'status', title: startOf(batch), 'data-cy': 'mshub-prepared' },
    isRunning ? bar('prepared-bar', batch.ended, batch.total) : null,
    element(
      'div',
      { class: 'mshub-row' },
      element('span', isRunning ? {} : { class: 'mshub-note' }, progress(batch)),
      isRunning ? button('prepare-stop', 'Stop', { act: () => workbench.preparation.stop(), title: STOPPING }) : null,
      isStopped ? button('prepare-go-on', 'Go on', { act: () => workbench.preparation.goOn(), title: GOING_ON }) : null
    ),
    batch.failures.length ? failuresOf(batch) : null
  );
}

const STOPPING = 'Stop before the next case; what is prepared is kept';
const GOING_ON = 'Go on with the cases that wait';
const startOf = ({ client, created, options }) =>
  `Started by ${client || 'somebody'}, ${moment(created)}, in the order “${orderOf(options.strategy)}”`;

const failuresOf = ({ failures }) =>
  element(
    'details',
    { open: failuresAreOpen, 'data-cy': 'mshub-prepare-failures' },
    element('summary', { onclick: () => (failuresAreOpen = !failuresAreOpen) }, 'Why some failed'),
    element(
      'ul',
      { class: 'mshub-note' },
      failures.map(({ image, message }) => element('li', { title: image }, message))
    )
  );

const training = [
  bench => ({
    reason: bench.reasonNotToTrain(),
    isTraining: bench.isTraining(),
    task: bench.training && { status: bench.training.status, ...bench.training.stats },
    counts: bench.information?.trainers?.[bench.model]?.mshub ?? null,
    title: bench.chosen() && titleOf(bench.chosen()),
  }),
  ({ reason, isTraining, task, counts, title }) => [
    heading('Fine-tuning'),
    isTraining ? trainingProgress(task) : null,
    isTraining
      ? null
      : [
          button('train', 'Fine-tune', {
            look: 'mshub-wide',
            act: () => workbench.train(),
            reason,
            title: `Train ${title} further with the reviewed cases; it serves only if it is better`,
          }),
          element('p', { class: 'mshub-note', 'data-cy': 'mshub-cases' }, countsText(counts) ?? reason),
          task?.message || task?.outcome ? lastTraining(task) : null,
        ],
  ],
];

function countsText(counts) {
  if (!counts || counts.problem) {
    return null;
  }
  const { new_cases: fresh, reviewed_cases: reviewed } = counts;
  return fresh === undefined ? `${reviewed} reviewed cases` : `${fresh} new of ${reviewed} reviewed cases`;
}

function trainingProgress({ epoch = 0, total_epochs: total, stage, message, best_metric: best, eta }) {
  const epochs = total ? `epoch ${epoch} of ${total}` : null;
  const metric = typeof best === 'number' ? `best Dice ${best.toFixed(3)}` : null;
  const left = typeof eta === 'number' ? `about ${duration(eta)} left` : null;
  return element(
    'div',
    { class: 'mshub-progress', role: 'status', 'data-cy': 'mshub-training' },
    bar('training-bar', epoch, total),
    element(
      'div',
      { class: 'mshub-row' },
      element('span', {}, [stage, epochs, metric, left].filter(Boolean).join(' · ') || 'starting'),
      button('stop', 'Stop', { act: () => workbench.stopTraining(), title: 'Stop the training' })
    ),
    message ? muted(message) : null
  );
}

function lastTraining({ status, message, version, outcome, report }) {
  const isSaid = outcome && message?.startsWith(outcome);
  const verdict = version && outcome ? `${version}: ${isSaid ? '' : `${outcome}. `}` : '';
  return element(
    'p',
    { class: `mshub-note${status === 'ERROR' ? ' mshub-warning' : ''}`, 'data-cy': 'mshub-trained' },
    `${verdict}${message ?? ''} `,
    report ? link('trained-report', 'Report', `/mshub/${report}`) : null
  );
}

export class OutcomePanel extends Panel {
  static sections = [submission, labels, leftOut, preparation, training];
}

export class ReviewPanel extends Panel {
  static sections = [draft, submit, next];
}
