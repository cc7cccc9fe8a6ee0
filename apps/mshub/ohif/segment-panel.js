/* Above OHIF's segments: choosing and running a model. */

import { NAMED_AT_MOST, bar, button, duration, heading, link, moment, muted } from './controls.js';
import { element } from './dom.js';
import { Panel } from './panel.js';
import { sentence, sureness } from './words.js';
import { titleOf, workbench } from './workbench.js';

const PERCENT = 100;

const trouble = [
  ({ problem, information }) => ({
    problem,
    pacs: information?.mshub?.pacs ?? null,
    isWaiting: !problem && !information,
  }),
  ({ problem, pacs, isWaiting }) => {
    const retry = button('retry', 'Retry', { act: () => workbench.refresh(), title: 'Ask the server again' });
    if (problem) {
      return element('div', { class: 'mshub-banner', role: 'alert', 'data-cy': 'mshub-problem' }, problem, retry);
    }
    if (pacs && pacs.reachable === false) {
      const text = pacs.message || `The PACS at ${pacs.url} does not answer.`;
      return element('div', { class: 'mshub-banner', role: 'alert', 'data-cy': 'mshub-pacs-problem' }, text, retry);
    }
    return isWaiting ? muted('Asking the server for its models …') : null;
  },
];

const subject = [
  ({ series }) => series && [series.modality, series.description, series.slices, series.number],
  shown => {
    if (!shown) {
      return element('p', { class: 'mshub-subject' }, muted('Drop a series into a viewport to begin.'));
    }
    const [modality, description, slices, number] = shown;
    return element(
      'p',
      { class: 'mshub-subject', 'data-cy': 'mshub-series', title: `Series ${number ?? ''}: ${description}` },
      element('b', {}, modality),
      ' ',
      element('span', { class: 'mshub-cut' }, description),
      muted(` ${slices} slices`)
    );
  },
];

const models = [
  bench =>
    (bench.series ? bench.models() : []).map(model => ({
      id: model.id,
      title: titleOf(model),
      facts: [figureOf(model.facts), model.facts.version].filter(Boolean).join(' · '),
      misfit: bench.misfit(model.id),
      isChosen: model.id === bench.model,
    })),
  shown => {
    const [fitting, others] = [shown.filter(({ misfit }) => !misfit), shown.filter(({ misfit }) => misfit)];
    return (
      shown.length > 0 && [
        heading('Model'),
        element(
          'div',
          {
            role: 'radiogroup',
            'aria-label': 'Model',
            class: 'mshub-models',
            'data-scrolls': '',
            'data-cy': 'mshub-models',
          },
          fitting.map(modelRow),
          others.length > 0 && unfitting(others, fitting.length === 0)
        ),
      ]
    );
  },
];

let othersAreOpen = false;

function unfitting(others, areAll) {
  const many =
    others.length === 1 ? '1 model does not fit this series' : `${others.length} models do not fit this series`;
  return element(
    'details',
    { open: othersAreOpen || areAll, 'data-cy': 'mshub-unfit' },
    element('summary', { 'data-cy': 'mshub-unfit-summary', onclick: () => (othersAreOpen = !othersAreOpen) }, many),
    others.map(modelRow)
  );
}

function modelRow({ id, title, facts, misfit, isChosen }) {
  return element(
    'label',
    { class: `mshub-model${misfit ? ' mshub-unfit' : ''}${isChosen ? ' mshub-chosen' : ''}`, title: misfit ?? title },
    element('input', {
      type: 'radio',
      name: 'mshub-model',
      value: id,
      checked: isChosen,
      disabled: Boolean(misfit),
      'data-cy': `mshub-model-${id}`,
      onchange: () => workbench.choose(id),
    }),
    element('span', {}, title),
    element('small', {}, misfit ?? facts)
  );
}

/** The figure of quality a model's card gives: a mean Dice. */
function figureOf({ dsc }) {
  return typeof dsc === 'number' ? `Dice ${dsc.toFixed(3).replace(/0$/, '')}` : 'Dice not known';
}

const details = [
  bench => {
    const { id, labels, facts } = bench.chosen() ?? {};
    return id ? { id, labels, facts } : null;
  },
  shown => {
    if (!shown) {
      return null;
    }
    const { id, labels, facts } = shown;
    const versions = facts.versions ?? [];
    const current = versions.find(version => version.current);
    const newest = versions.at(-1);
    return element(
      'details',
      { 'data-cy': 'mshub-details', open: detailsAreOpen },
      element(
        'summary',
        { 'data-cy': 'mshub-verdict', onclick: () => (detailsAreOpen = !detailsAreOpen) },
        standing(current, newest)
      ),
      facts_([
        ['Structures', Object.keys(labels ?? {}).join(', ')],
        ['Target', facts.target],
        ['Region', facts.site],
        ['Quality', [figureOf(facts), facts.dsc_source].filter(Boolean).join(', ')],
        ['Licence', facts.licence],
        ['Origin', originOf(facts.origin ?? {})],
      ]),
      current ? verdictOf('In use', current) : null,
      newest && newest !== current ? verdictOf('Newest', newest) : null,
      muted(`Identifier: ${id}`)
    );
  },
];

let detailsAreOpen = false;

const facts_ = rows =>
  element(
    'dl',
    {},
    rows.filter(([, value]) => value).map(([name, value]) => [element('dt', {}, name), element('dd', {}, value)])
  );
const originOf = ({ from } = {}) => (/^https?:\/\//.test(from ?? '') ? link('origin', from, from) : from);
const verdictWord = ({ outcome, origin }) => outcome ?? origin;

/** One line: which version serves and how it got there, and what became of a newer one. */
function standing(current, newest) {
  const used = current ? `${current.version} in use, ${verdictWord(current)}` : 'no version in use';
  return newest && newest !== current ? `${used} · ${newest.version} ${verdictWord(newest)}` : used;
}

function verdictOf(name, version) {
  return element(
    'p',
    { 'data-cy': `mshub-version-${version.version}` },
    element('b', {}, `${name}: ${version.version}, ${verdictWord(version)}`),
    version.created ? muted(` ${moment(version.created)}`) : null,
    version.reason ? element('span', { class: 'mshub-block' }, version.reason) : null,
    version.report ? link(`report-${version.version}`, 'Report', version.report, { title: 'How it was judged' }) : null
  );
}

const channels = [
  bench => ({
    problem:
      bench.channels.every(channel => bench.seriesOfChannel(channel)) && bench.channels.length
        ? null
        : bench.channelProblem,
    rows: bench.channels.map(channel => ({
      ...channel,
      chosen: bench.seriesOfChannel(channel),
      isOwn: channel.name in bench.overrides,
    })),
  }),
  ({ problem, rows }) => [
    rows.length || problem ? heading('Series of the channels') : null,
    problem
      ? element('p', { class: 'mshub-warning', role: 'alert', 'data-cy': 'mshub-channel-problem' }, problem)
      : null,
    rows.map(channelRow),
  ],
];

function channelRow(channel) {
  const { name, sequence, chosen, isOwn, why, candidates } = channel;
  const option = ({ SeriesInstanceUID, description, sequence: found }) =>
    element(
      'option',
      { value: SeriesInstanceUID, selected: SeriesInstanceUID === chosen },
      [description || 'no description', found].filter(Boolean).join(' · ')
    );
  return element(
    'label',
    { class: 'mshub-channel', title: isOwn ? 'Your choice.' : why },
    element('span', {}, name, sequence && sequence !== name ? muted(` ${sequence}`) : null),
    element(
      'select',
      { 'data-cy': `mshub-channel-${name}`, onchange: event => workbench.assign(name, event.target.value) },
      chosen ? null : element('option', { value: '', selected: true, disabled: true }, 'Choose a series …'),
      candidates.map(option)
    )
  );
}

const run = [
  bench => ({
    reason: bench.run ? null : bench.reasonNotToRun(),
    isRunning: Boolean(bench.run),
    isHere: Boolean(bench.information),
  }),
  ({ reason, isRunning, isHere }) =>
    isHere && !isRunning
      ? element(
          'div',
          { class: 'mshub-row mshub-actions' },
          button('run', 'Segment', {
            look: 'mshub-primary mshub-first',
            act: () => workbench.segment(),
            reason,
            title: 'Run the model on this series (Shift+A)',
          }),
          button('draw', 'By hand', {
            act: () => workbench.drawByHand(),
            reason,
            title: 'Start an empty segmentation with the structures of this model',
          })
        )
      : null,
];

const prelabel = [
  bench => {
    const { model_version: version, ts } = bench.prelabel() ?? {};
    return version && { version, at: moment(ts), isNewest: version === bench.chosen()?.facts.version };
  },
  shown =>
    shown &&
    button('prelabel', 'Show pre-label', {
      look: 'mshub-wide',
      act: () => workbench.showPrelabel(),
      title: `What version ${shown.version} found, ${shown.at}${shown.isNewest ? '' : '; another version is in use now'}`,
    }),
];

const progress = [
  ({ run: active }) =>
    active && {
      stage: active.stage ?? 'waiting',
      done: active.tiles_done,
      total: active.tiles_total,
      left: active.seconds_left && Math.ceil(active.seconds_left),
      seconds: Math.round((Date.now() - active.started) / 1000),
    },
  shown =>
    shown &&
    element(
      'div',
      { class: 'mshub-progress', role: 'status', 'data-cy': 'mshub-progress' },
      bar('progress-bar', shown.done, shown.total),
      element(
        'div',
        { class: 'mshub-row' },
        element('span', {}, progressText(shown)),
        button('cancel', 'Cancel', { act: () => workbench.cancel(), title: 'Stop waiting for this run' })
      )
    ),
];

function progressText({ stage, done, total, left, seconds }) {
  const tiles = total ? `, ${Math.round((PERCENT * done) / total)} %` : '';
  const time = left ? `about ${duration(left)} left` : duration(seconds);
  return `${stage[0].toUpperCase()}${stage.slice(1)}${tiles} · ${time}`;
}

const result = [
  ({ lastRun, run: active }) => {
    if (active || !lastRun) {
      return null;
    }
    const { seconds, ts, model_version: version, voxel_counts: counts, flags = [] } = lastRun;
    return { seconds, ts, version, counts, flags, sure: sureness(lastRun) };
  },
  shown => {
    if (!shown) {
      return null;
    }
    const { version = 'not known', flags, sure } = shown;
    const counts = Object.entries(shown.counts ?? {});
    const absent = counts.filter(([, count]) => !count).map(([name]) => name);
    return element(
      'p',
      { class: 'mshub-note', role: 'status', 'data-cy': 'mshub-result' },
      shown.ts
        ? `Pre-label of version ${version}, ${moment(shown.ts)}.`
        : `Segmented in ${duration(shown.seconds)} with version ${version}.`,
      absent.length
        ? element(
            'span',
            { class: 'mshub-block', title: `Not found: ${absent.join(', ')}` },
            absentText(absent, counts.length)
          )
        : null,
      sure
        ? element('span', { class: 'mshub-block', title: sure.title, 'data-cy': 'mshub-sureness' }, `${sure.text}.`)
        : null,
      flags.length
        ? element('span', { class: 'mshub-block', 'data-cy': 'mshub-flags' }, flags.map(sentence).join(' '))
        : null
    );
  },
];

const absentText = (absent, all) =>
  absent.length > NAMED_AT_MOST
    ? `Found ${all - absent.length} of ${all} structures.`
    : `Not found: ${absent.join(', ')}.`;

export class SegmentPanel extends Panel {
  static sections = [trouble, subject, models, details, channels, run, prelabel, progress, result];
}
