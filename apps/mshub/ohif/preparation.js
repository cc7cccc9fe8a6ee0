/* Cases that are segmented before anybody opens them: batches of pre-labels, of which the newest of each model counts. */

import * as server from './server.js';
import { progress } from './words.js';

const POLL_MS = 1500;
const USUAL_LIMIT = 10;
const OF_LABELLED = new Set(['relabel']); // strategies that choose among labelled cases

const isAtWork = ({ state, counts }) => state === 'running' || counts.running > 0;

export class Preparation {
  /** @param {Workbench} bench whose chosen model and strategy count */
  constructor(bench) {
    this.bench = bench;
    this.limit = USUAL_LIMIT;
    this.batches = null; // model -> its newest batch; null until the server has said
    this.isStarting = false;
  }

  /** The newest batch of the chosen model; null if there is none to speak of. */
  batch() {
    return this.batches?.get(this.bench.model) ?? null;
  }

  /** Take over how many cases are wanted; returns the number, where the text is none the usual one. */
  setLimit(text) {
    this.limit = Math.max(1, Math.round(Number(text)) || USUAL_LIMIT);
    return this.limit;
  }

  reasonNotToStart() {
    if (this.isStarting) {
      return 'The server is choosing the cases.';
    }
    if (!this.bench.model) {
      return 'Choose a model first.';
    }
    const isOfLabelled = OF_LABELLED.has(this.bench.strategy);
    return isOfLabelled ? 'The chosen order is one of labelled cases: choose another one beside Next case.' : null;
  }

  /** Let the chosen model segment the first cases in the order of the chosen strategy. */
  async start() {
    const { bench, limit } = this;
    this.isStarting = true;
    bench.changed();
    try {
      const options = { strategy: bench.strategy, limit, client_id: bench.client() };
      const batch = await server.startPrelabelling(bench.model, options);
      if (batch.total) {
        this.take(batch);
        this.follow();
      } else {
        bench.tell('Nothing to prepare', 'Every case for this model has a final label.', 'info');
      }
    } catch (error) {
      bench.fail('No cases are prepared', error);
    } finally {
      this.isStarting = false;
      bench.changed();
    }
  }

  /** Stop the batch of the chosen model before its next case. */
  stop() {
    return this.change(server.stopPrelabelling, 'The preparation could not be stopped');
  }

  /** Let the batch of the chosen model go on. */
  goOn() {
    return this.change(server.resumePrelabelling, 'The preparation does not go on');
  }

  async change(ask, failure) {
    try {
      this.take(await ask(this.batch().id));
      this.follow();
    } catch (error) {
      this.bench.fail(failure, error);
    }
    this.bench.changed();
  }

  /** Find the batches that were started before this page was opened, by anybody; those that were done are past. */
  async look() {
    try {
      const newest = new Map();
      (await server.prelabellings()).forEach(batch => newest.has(batch.model) || newest.set(batch.model, batch));
      const known = (this.batches ??= new Map());
      newest.forEach((batch, model) => {
        if (batch.state !== 'done' || known.get(model)?.id === batch.id) {
          this.take(batch);
        }
      });
      this.follow();
    } catch (error) {
      console.warn('which cases are prepared is not known', error);
    }
  }

  /** Follow the batches at work until they end. */
  async follow() {
    const atWork = () => [...(this.batches?.values() ?? [])].filter(isAtWork);
    try {
      const told = await Promise.all(atWork().map(({ id }) => server.prelabelling(id)));
      told.forEach(batch => this.take(batch));
    } catch (error) {
      console.warn('how far the preparation is, is not known', error);
    }
    clearTimeout(this.timer);
    if (atWork().length) {
      this.timer = setTimeout(() => this.follow(), POLL_MS);
    }
    this.bench.changed();
  }

  /** Take in what the server says of a batch: the series that is looked at may have its pre-label now. */
  take(batch) {
    const former = this.batches.get(batch.model);
    this.batches.set(batch.model, batch);
    if (former?.id !== batch.id) {
      return;
    }
    if (batch.ended > former.ended) {
      this.bench.readLabels();
    }
    if (former.state !== 'done' && batch.state === 'done') {
      const isWhole = batch.counts.failed === 0;
      this.bench.tell('Preparation ended', `${progress(batch)}.`, isWhole ? 'success' : 'warning');
    }
  }
}
