/*
 * What a radiologist does with MSHub in one browser tab: the state the panels show, and the actions behind their
 * buttons. There is one workbench for the life of the page: what is not submitted outlives a change of study.
 */

import { ask } from './dialog.js';
import { fingerprint, readLabel, seriesOf, showLabel, undrawn } from './labelmaps.js';
import { Preparation } from './preparation.js';
import { activeSeries } from './series.js';
import * as server from './server.js';
import { sentence } from './words.js';

const RUN_POLL_MS = 700;
const TRAINING_POLL_MS = 1500;
const REDRAW_MS = 500;
const REDRAW_TRIES = 20;
const TOAST_MS = 5000;
const LONG_TOAST_MS = 20000;
const NAME_KEY = 'mshub.reviewer';
const TRAINING_ENDED = new Set(['DONE', 'ERROR', 'STOPPED', 'REVOKED']);

export class Workbench extends EventTarget {
  constructor() {
    super();
    this.information = null; // what /info/ says
    this.problem = null; // why there is no information
    this.series = null; // of the active viewport
    this.model = null; // id of the chosen model
    this.channels = []; // which series serves which channel of the chosen model
    this.channelProblem = null;
    this.overrides = {}; // channel name -> SeriesInstanceUID, the user's choice
    this.run = null; // the prediction at work
    this.lastRun = null; // facts of the last one, or of the pre-label that is shown
    this.submitting = false;
    this.submission = null; // what the server said of the last submitted label
    this.tags = {}; // labels the server has of this series
    this.leftOut = []; // SEGs of this series in the PACS that are no label here, and why
    this.strategy = null;
    this.suggestion = null; // the case the server named, and why
    this.advice = null; // whether labelling on pays, as the server sees it, and for which model
    this.findingNext = false;
    this.training = null; // the task at work, or the last one
    this.preparation = new Preparation(this);
    this.reviewer = localStorage.getItem(NAME_KEY) ?? '';
    this.records = new Map(); // segmentation id -> what is known of it
    this.drafts = new Map(); // SeriesInstanceUID -> a label that was left without submitting it
    this.unsubscribe = [];
    window.addEventListener('beforeunload', event => this.hasUnsaved() && event.preventDefault());
  }

  // -- the viewer ---------------------------------------------------------------------------------------------------

  /** Connect to OHIF's services; called once, when the extension is registered. */
  connect({ servicesManager, commandsManager }) {
    this.services = servicesManager.services;
    this.commands = commandsManager;
  }

  /** A study was opened in the MSHub mode. */
  enter() {
    this.unsubscribe.splice(0).forEach(unsubscribe => unsubscribe());
    const { cornerstoneViewportService, segmentationService, viewportGridService } = this.services;
    const on = (service, name, act) => this.unsubscribe.push(service.subscribe(service.EVENTS[name], act).unsubscribe);
    on(viewportGridService, 'ACTIVE_VIEWPORT_ID_CHANGED', () => this.look());
    on(viewportGridService, 'GRID_STATE_CHANGED', () => this.look());
    on(viewportGridService, 'VIEWPORTS_READY', () => this.look());
    on(segmentationService, 'SEGMENTATION_DATA_MODIFIED', ({ segmentationId }) => this.touch(segmentationId));
    on(segmentationService, 'SEGMENTATION_ADDED', ({ segmentationId }) => this.notice(segmentationId));
    on(segmentationService, 'SEGMENTATION_MODIFIED', () => this.changed());
    on(segmentationService, 'SEGMENTATION_REPRESENTATION_MODIFIED', () => {
      this.redraw();
      this.changed();
    });
    on(cornerstoneViewportService, 'VIEWPORT_VOLUMES_CHANGED', () => this.redraw());
    on(segmentationService, 'SEGMENTATION_REMOVED', ({ segmentationId }) => this.forget(segmentationId));
    this.submission = null;
    this.refresh();
  }

  /** The study is about to be closed: keep what was changed and not submitted. */
  leave() {
    this.run?.abort.abort();
    this.unsubscribe.splice(0).forEach(unsubscribe => unsubscribe());
    this.touched().forEach(segmentation => this.keep(segmentation));
    this.records.clear();
    this.series = null;
  }

  /** Keep a segmentation that was changed and not submitted, until its series is opened again. */
  keep(segmentation) {
    try {
      const { label, segments } = readLabel(segmentation);
      const record = this.records.get(segmentation.segmentationId);
      this.drafts.set(seriesOf(segmentation), { title: segmentation.label, label, segments, record, at: new Date() });
      const message = `${segmentation.label} was not submitted. Open its study again to go on.`;
      this.tell('Your changes are kept', message, 'warning');
    } catch (error) {
      this.fail(`${segmentation.label} could not be kept`, error);
    }
  }

  /** See which series is looked at, and ask the server about it if it is another one. */
  look() {
    const series = activeSeries(this.services);
    if (series?.uid === this.series?.uid && series?.slices === this.series?.slices) {
      return;
    }
    const isOther = series?.uid !== this.series?.uid;
    this.series = series;
    if (isOther) {
      Object.assign(this, { overrides: {}, submission: null, tags: {}, leftOut: [], lastRun: null });
      this.chooseFitting();
      this.readChannels();
      this.readLabels();
    }
    this.changed();
  }

  /** Draw segmentations in viewports that have just become volumes: OHIF 3.13.2 tries once, too early. */
  redraw(tries = REDRAW_TRIES) {
    clearTimeout(this.redrawTimer);
    this.redrawTimer = setTimeout(() => {
      const missing = undrawn(this.services);
      missing.forEach(window.cornerstoneTools.utilities.segmentation.triggerSegmentationRenderBySegmentationId);
      if (missing.length && tries > 0) {
        this.redraw(tries - 1);
      }
    }, REDRAW_MS);
  }

  changed() {
    this.dispatchEvent(new Event('change'));
  }

  tell(title, message, type = 'success') {
    const duration = type === 'success' ? TOAST_MS : LONG_TOAST_MS;
    const position = 'bottom-center'; // the panels are on the right
    this.services.uiNotificationService.show({ title, message, type, duration, position, allowDuplicates: true });
  }

  fail(title, error) {
    console.error(title, error);
    this.tell(title, error.message, 'error');
  }

  // -- what the server has ------------------------------------------------------------------------------------------

  /** Read models, versions, strategies and trainers. */
  async refresh() {
    try {
      this.information = await server.information();
      this.problem = null;
      this.strategy ??= Object.keys(this.information.strategies ?? {})[0] ?? null;
      this.chooseFitting();
      this.readChannels();
      this.readLabels();
      this.lookForTraining();
      this.preparation.look();
    } catch (error) {
      this.problem = error.message;
    }
    this.changed();
  }

  models() {
    const fits = model => (this.misfit(model.id) ? 1 : 0);
    return Object.entries(this.information?.models ?? {})
      .map(([id, model]) => ({ id, ...model, facts: model.mshub ?? {} }))
      .sort((a, b) => fits(a) - fits(b) || titleOf(a).localeCompare(titleOf(b)));
  }

  chosen() {
    return this.models().find(({ id }) => id === this.model) ?? null;
  }

  /** Why a model cannot be run on the series that is looked at; null if it can. */
  misfit(id) {
    const wanted = this.information?.models?.[id]?.mshub?.modality;
    if (!this.series) {
      return 'No image series is shown in the active viewport.';
    }
    if (wanted && wanted !== 'other' && wanted !== this.series.modality) {
      return `For ${wanted}; this series is ${this.series.modality}.`;
    }
    return null;
  }

  chooseFitting() {
    const known = this.models();
    if (!known.some(({ id }) => id === this.model) || this.misfit(this.model)) {
      this.model = known.find(({ id }) => !this.misfit(id))?.id ?? null;
    }
  }

  choose(model) {
    this.model = model;
    this.overrides = {};
    this.readChannels();
    this.changed();
  }

  /** Ask which series of the study serve the channels of the chosen model; models of one channel need no answer. */
  async readChannels() {
    this.channels = [];
    this.channelProblem = null;
    const { model, series } = this;
    if (!series || !model || (this.chosen()?.facts.channels?.length ?? 1) < 2) {
      return;
    }
    try {
      const found = await server.channels(model, series.uid);
      if (model === this.model && series.uid === this.series?.uid) {
        this.channels = found.channels;
        this.channelProblem = found.problem;
      }
    } catch (error) {
      this.channelProblem = error.message;
    }
    this.changed();
  }

  assign(channel, uid) {
    this.overrides = { ...this.overrides, [channel]: uid };
    this.changed();
  }

  seriesOfChannel(channel) {
    return this.overrides[channel.name] ?? channel.series ?? null;
  }

  async readLabels() {
    const { series } = this;
    if (!series) {
      return;
    }
    try {
      const { tags = {}, left_out: leftOut = [] } = await server.labels(series.uid);
      if (series.uid === this.series?.uid) {
        Object.assign(this, { tags, leftOut });
      }
    } catch (error) {
      console.warn('labels of the series are not known', error);
    }
    this.changed();
  }

  // -- segmentations ------------------------------------------------------------------------------------------------

  /** The segmentation that is edited in the active viewport; null if there is none. */
  active() {
    const { segmentationService, viewportGridService } = this.services;
    const active = segmentationService.getActiveSegmentation(viewportGridService.getActiveViewportId());
    return seriesOf(active) ? active : null;
  }

  /** A segmentation appeared, whoever made it: remember what it holds. */
  notice(segmentationId) {
    this.records.set(segmentationId, { touched: false, print: this.printOf(segmentationId) });
    this.changed();
  }

  /** A segmentation was said to be changed, which OHIF also says when it is merely drawn: see whether it was. */
  touch(segmentationId) {
    const record = this.records.get(segmentationId) ?? {};
    if (!record.touched && this.printOf(segmentationId) !== record.print) {
      this.records.set(segmentationId, { ...record, touched: true });
    }
    this.changed();
  }

  /** The fingerprint of a segmentation; null where it cannot be read as one label. */
  printOf(segmentationId) {
    try {
      return fingerprint(readLabel(this.services.segmentationService.getSegmentation(segmentationId)).voxels);
    } catch (error) {
      console.warn('a segmentation cannot be read', error);
      return null;
    }
  }

  forget(segmentationId) {
    this.records.delete(segmentationId);
    this.changed();
  }

  touched() {
    const all = this.services?.segmentationService.getSegmentations() ?? [];
    return all.filter(({ segmentationId }) => this.records.get(segmentationId)?.touched);
  }

  hasUnsaved() {
    return this.drafts.size > 0 || this.touched().length > 0;
  }

  async show(series, image, { title, names, colours, record }) {
    const { segmentationId, voxels } = await showLabel(this.services, series, image, { title, names, colours });
    this.records.set(segmentationId, { touched: false, print: fingerprint(voxels), ...record });
    this.changed();
  }

  // -- predictions --------------------------------------------------------------------------------------------------

  /** Why the chosen model cannot be run now; null if it can. */
  reasonNotToRun() {
    if (this.run) {
      return 'A model is running.';
    }
    if (!this.chosen()) {
      return this.information ? 'Choose a model that fits this series.' : 'The server has not answered yet.';
    }
    if (this.misfit(this.model)) {
      return this.misfit(this.model);
    }
    if (!this.series.isVolume) {
      return 'This series has one slice; a volume is needed.';
    }
    const without = this.channels.filter(channel => !this.seriesOfChannel(channel)).map(({ name }) => name);
    if (without.length) {
      return `Choose a series for ${without.join(', ')}.`;
    }
    return this.channels.length ? null : this.channelProblem;
  }

  /** Run the chosen model on the series that is looked at and show what it found. */
  async segment() {
    const reason = this.reasonNotToRun();
    if (reason) {
      this.tell('Cannot segment', reason, 'warning');
      return;
    }
    const [{ series }, model] = [this, this.chosen()];
    const former = await this.decideOnFormer(model);
    if (former === undefined) {
      return;
    }
    const abort = new AbortController();
    this.run = { model: model.id, abort, stage: 'sending', started: Date.now() };
    this.changed();
    const timer = setInterval(() => this.followRun(), RUN_POLL_MS);
    try {
      // Kept as the pre-label: a correction is then known to start from it, and compared with it.
      const params = { client_id: this.client(), save_label: true, ...this.chosenSeries() };
      const { facts, image } = await server.infer(model.id, series.uid, params, abort.signal);
      if (this.series?.uid !== series.uid) {
        throw new Error(
          'The result belongs to another series than the one shown now. Open that series and run it again.'
        );
      }
      former?.forEach(segmentation => this.services.segmentationService.remove(segmentation.segmentationId));
      const version = facts.model_version ?? model.facts.version;
      const title = [titleOf(model), version].filter(Boolean).join(' ');
      const record = { model: model.id, version };
      await this.show(series, image, { title, names: facts.label_names, colours: model.facts.colours, record });
      this.lastRun = { ...facts, seconds: (Date.now() - this.run.started) / 1000 };
      this.readLabels();
    } catch (error) {
      if (error.name !== 'AbortError') {
        this.fail(`${titleOf(model)} failed`, error);
      }
    } finally {
      clearInterval(timer);
      this.run = null;
      this.changed();
    }
  }

  /** What the server keeps of the chosen model for this series, while nothing is shown; null if there is nothing. */
  prelabel() {
    const { params, ts } = this.tags.original ?? {};
    return params && params.model === this.model && !this.run && !this.active() ? { ...params, ts } : null;
  }

  /** Show the pre-label as if the model had run just now. */
  async showPrelabel() {
    const [{ series }, model, facts] = [this, this.chosen(), this.prelabel()];
    try {
      const { names, image } = await server.stored(series.uid, 'original');
      const title = [titleOf(model), facts.model_version].filter(Boolean).join(' ');
      const record = { model: model.id, version: facts.model_version };
      await this.show(series, image, { title, names, colours: model.facts.colours, record });
      this.lastRun = facts;
    } catch (error) {
      this.fail('The pre-label cannot be shown', error);
    }
    this.changed();
  }

  /** Show an empty segmentation with the structures of the chosen model, to draw them. */
  async drawByHand() {
    const model = this.chosen();
    try {
      const look = { title: `${titleOf(model)} by hand`, names: model.labels, colours: model.facts.colours };
      await this.show(this.series, null, { ...look, record: { model: model.id } });
    } catch (error) {
      this.fail('No segmentation to draw in', error);
    }
  }

  /** Stop waiting for a prediction; the server finishes it and drops the result. */
  cancel() {
    this.run?.abort.abort();
    this.tell('Not waiting any longer', 'The server finishes this run and drops its result.', 'info');
  }

  async followRun() {
    try {
      const { model, series, run } = this;
      const mine = (await server.running()).find(
        other => other.model === run?.model && other.image === series?.uid && other.client === this.client()
      );
      if (this.run && this.run === run && model) {
        Object.assign(this.run, mine ?? {});
        this.changed();
      }
    } catch (error) {
      console.warn('the progress of the run is not known', error);
    }
  }

  chosenSeries() {
    return Object.keys(this.overrides).length ? { series: this.overrides } : {};
  }

  /** Return former results of this model that make way, [] if none does, undefined if nothing shall happen. */
  async decideOnFormer(model) {
    const former = this.services.segmentationService.getSegmentations().filter(segmentation => {
      const record = this.records.get(segmentation.segmentationId);
      return record?.model === model.id && seriesOf(segmentation) === this.series.uid;
    });
    if (!former.some(({ segmentationId }) => this.records.get(segmentationId).touched)) {
      return former;
    }
    const answer = await ask({
      title: 'Replace your corrections?',
      text: `${former.at(-1).label} was changed and not submitted. Running ${titleOf(model)} again can replace it.`,
      choices: { keep: 'Keep both', replace: 'Replace', cancel: 'Cancel' },
    });
    return { keep: [], replace: former }[answer];
  }

  // -- review -------------------------------------------------------------------------------------------------------

  setReviewer(name) {
    this.reviewer = name.trim();
    localStorage.setItem(NAME_KEY, this.reviewer);
  }

  client() {
    return this.reviewer || 'ohif';
  }

  reasonNotToSubmit() {
    if (this.submitting) {
      return 'The label is being sent.';
    }
    return this.active() ? null : 'There is no segmentation yet: run a model, or add one and draw.';
  }

  /** Send the segmentation that is edited to the server, as the reviewed label of its series. */
  async submit() {
    const reason = this.reasonNotToSubmit();
    if (reason) {
      this.tell('Cannot submit', reason, 'warning');
      return false;
    }
    const segmentation = this.active();
    const [series, { segmentationId }] = [seriesOf(segmentation), segmentation];
    this.submitting = true;
    this.changed();
    try {
      const { label, voxels, segments } = readLabel(segmentation);
      const record = this.records.get(segmentationId) ?? {};
      const model = record.model ?? this.model ?? '';
      const params = { label_info: segments, model, client_id: this.client() };
      const answer = await server.submit(series, label, params);
      const print = fingerprint(voxels);
      const submission = { ...answer, at: new Date(), unchanged: record.print === print };
      this.records.set(segmentationId, { ...record, model, print, touched: false });
      this.drafts.delete(series);
      this.submission = submission;
      this.tell(
        'Submitted',
        `${segmentation.label}: ${storedIn(answer.pacs)}${hintsText(answer.hints)}`,
        answer.pacs?.stored === false ? 'warning' : 'success'
      );
      this.refresh();
      return true;
    } catch (error) {
      this.fail('Not submitted', error);
      return false;
    } finally {
      this.submitting = false;
      this.changed();
    }
  }

  /** Show the label somebody submitted of this series. */
  async loadSubmitted() {
    const { series } = this;
    try {
      const { names, image } = await server.stored(series.uid);
      const colours = this.information?.models?.[this.tags.final?.model]?.mshub?.colours;
      const record = { model: this.tags.final?.model };
      await this.show(series, image, { title: 'Submitted label', names, colours, record });
    } catch (error) {
      this.fail('The submitted label cannot be shown', error);
    }
  }

  draft() {
    return this.series ? this.drafts.get(this.series.uid) : undefined;
  }

  /** Go on with the changes of this series that were left without submitting them. */
  async restoreDraft() {
    const { title, label, segments, record } = this.draft();
    try {
      const names = Object.fromEntries(segments.map(({ name, idx }) => [name, idx]));
      const colours = this.information?.models?.[record.model]?.mshub?.colours;
      await this.show(this.series, await label.arrayBuffer(), {
        title,
        names,
        colours,
        record: { ...record, touched: true },
      });
      this.dropDraft();
    } catch (error) {
      this.fail('The unsubmitted changes cannot be shown', error);
    }
  }

  dropDraft() {
    this.drafts.delete(this.series.uid);
    this.changed();
  }

  // -- the next case ------------------------------------------------------------------------------------------------

  setStrategy(strategy) {
    this.strategy = strategy;
    this.changed();
  }

  /** Open the case the strategy names. */
  async next() {
    if (!(await this.mayLeave())) {
      return;
    }
    this.findingNext = true;
    this.changed();
    try {
      const skip = this.series ? [this.series.uid] : [];
      const found = await server.nextCase(this.strategy, { client_id: this.client(), model: this.model, skip });
      this.advice = found.hint ? { model: this.model, text: found.hint } : null;
      this.tellPassedOver(Object.values(found.passed_over ?? {}));
      if (!found.StudyInstanceUID) {
        this.tell('No next case', sentence(found.why ?? 'every case for this model has a reviewed label'), 'info');
        return;
      }
      this.suggestion = found;
      if (found.SeriesInstanceUID === this.series?.uid) {
        this.tell('No other case', sentence(`the one that is open comes next: ${found.why}`), 'info');
        return;
      }
      this.open(found);
    } catch (error) {
      this.fail('No next case', error);
    } finally {
      this.findingNext = false;
      this.changed();
    }
  }

  tellPassedOver(reasons) {
    if (reasons.length) {
      const title = reasons.length === 1 ? 'A case was passed over' : `${reasons.length} cases were passed over`;
      this.tell(title, sentence(reasons[0]), 'warning');
    }
  }

  open({ StudyInstanceUID, SeriesInstanceUID }) {
    const query = new URLSearchParams({
      StudyInstanceUIDs: StudyInstanceUID,
      initialSeriesInstanceUID: SeriesInstanceUID,
    });
    this.commands.run('navigateHistory', { to: `/mshub?${query}` });
  }

  async mayLeave() {
    if (!this.touched().length) {
      return true;
    }
    const answer = await ask({
      title: 'Submit your corrections first?',
      text: `${this.touched().at(-1).label} was changed and not submitted.`,
      choices: { submit: 'Submit and go on', leave: 'Go on, keep them for later', cancel: 'Stay' },
    });
    return answer === 'submit' ? this.submit() : answer === 'leave';
  }

  // -- fine-tuning --------------------------------------------------------------------------------------------------

  isTraining() {
    return Boolean(this.training) && !TRAINING_ENDED.has(this.training.status);
  }

  reasonNotToTrain() {
    if (this.isTraining()) {
      return 'A training runs already.';
    }
    const trainer = this.information?.trainers?.[this.model];
    if (!trainer) {
      return this.model ? 'This model cannot be fine-tuned here.' : 'Choose a model first.';
    }
    const { new_cases: fresh, problem } = trainer.mshub ?? {};
    return problem ?? (fresh === 0 ? 'No reviewed case is new to this model: submit a label first.' : null);
  }

  async train() {
    try {
      this.training = await server.startTraining(this.model, { client_id: this.client() });
      this.followTraining();
    } catch (error) {
      this.fail('Fine-tuning did not start', error);
    }
    this.changed();
  }

  async stopTraining() {
    const answer = await ask({
      title: 'Stop the training?',
      text: 'What serves now goes on serving. The same training can go on later from where it stopped.',
      choices: { stop: 'Stop', cancel: 'Go on training' },
    });
    if (answer !== 'stop') {
      return;
    }
    try {
      this.training = (await server.stopTraining()) ?? this.training;
    } catch (error) {
      this.fail('The training could not be stopped', error);
    }
    this.followTraining();
  }

  /** Follow a training that was started before this page was opened, by anybody. */
  lookForTraining() {
    const wasTrained = Object.values(this.information.train_stats ?? {}).some(stats => Object.keys(stats).length > 0);
    if (wasTrained && !this.isTraining()) {
      this.followTraining();
    }
  }

  /** Show the training at work until it ends; then its verdict, and the version that serves. */
  async followTraining() {
    clearTimeout(this.trainingTimer);
    const ran = this.isTraining();
    try {
      this.training = await server.training();
    } catch (error) {
      console.warn('the progress of the training is not known', error);
    }
    if (this.isTraining()) {
      this.trainingTimer = setTimeout(() => this.followTraining(), TRAINING_POLL_MS);
    } else if (ran) {
      this.tellVerdict();
      this.refresh();
    }
    this.changed();
  }

  tellVerdict() {
    const { status, stats = {} } = this.training ?? {};
    const type = { ERROR: 'error', STOPPED: 'info' }[status] ?? (stats.outcome === 'promoted' ? 'success' : 'warning');
    const title =
      status === 'DONE' ? `Version ${stats.version ?? ''} ${stats.outcome ?? 'is ready'}` : 'Training ended';
    this.tell(title, stats.message ?? '', type);
  }
}

/** Where a submitted label is, in words. */
export function storedIn(pacs) {
  if (!pacs) {
    return 'Stored on the server.';
  }
  return (
    pacs.message || (pacs.stored ? 'Stored on the server, and in the PACS as DICOM SEG.' : 'Not stored in the PACS.')
  );
}

const hintsText = (hints = []) => (hints.length ? ' Hints about it are in the panel.' : '');

export const titleOf = model => model.facts?.title ?? model.mshub?.title ?? model.id;

export const workbench = new Workbench();
