/* The MSHub server as the panel sees it: one function per request; every failure is an Error with a sentence. */

export class ServerError extends Error {
  /**
   * @param {string} message the server's own sentence
   * @param {number} status HTTP status; 0 where no server answered
   */
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

const UNREACHABLE =
  'The MSHub server does not answer. Check that it runs and that this computer reaches it, then retry.';

const LOGGED_OUT =
  'You are not logged in any more. Log in at /login in another tab, then do it again: nothing on this page is lost.';

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === 'AbortError') {
      throw error;
    }
    throw new ServerError(UNREACHABLE, 0);
  }
  if (response.status === 401) {
    throw new ServerError(LOGGED_OUT, response.status);
  }
  if (!response.ok) {
    throw new ServerError(await sentenceOf(response), response.status);
  }
  return response;
}

async function sentenceOf(response) {
  const text = await response.text();
  try {
    const { detail } = JSON.parse(text);
    return typeof detail === 'string' ? detail : JSON.stringify(detail);
  } catch {
    return `The server answered ${response.status} ${response.statusText}. Look at its log at /logs/.`;
  }
}

const json = async (path, options) => (await ask(path, options)).json();
const posted = content => ({
  method: 'POST',
  headers: { 'Content-Type': 'application/json' },
  body: JSON.stringify(content),
});
const at = (path, query) => `${path}?${new URLSearchParams(query)}`;
const segment = encodeURIComponent;

/** Who is logged in; null on a server without users, and where nobody can tell. */
export async function account() {
  try {
    return (await json('/auth/')).enabled ? await json('/auth/token/valid') : null;
  } catch {
    return null;
  }
}

export const information = () => json('/info/');
export const running = async () => (await json('/mshub/status')).running ?? [];
export const channels = (model, image) => json(at(`/mshub/channels/${segment(model)}`, { image }));
/** The labels of a series by tag, and the SEGs of the PACS that are none, each with the reason. */
export const labels = image => json(`/mshub/labels/${segment(image)}`);
export const nextCase = (strategy, content) => json(`/activelearning/${segment(strategy)}`, posted(content));
export const startTraining = (model, content) => json(`/train/${segment(model)}`, posted(content));
export const stopTraining = () => json('/train/', { method: 'DELETE' });
/** All batches of pre-labels, newest first. */
export const prelabellings = () => json('/mshub/prelabels');
export const prelabelling = batch => json(`/mshub/prelabels/${segment(batch)}`);
export const startPrelabelling = (model, content) => json(`/mshub/prelabels/${segment(model)}`, posted(content));
export const stopPrelabelling = batch => json(`/mshub/prelabels/${segment(batch)}`, { method: 'DELETE' });
export const resumePrelabelling = batch => json(`/mshub/prelabels/${segment(batch)}`, { method: 'PUT' });

/** The address of a stored label as a file; `format` is nrrd, seg or rtstruct. */
export const exportAddress = (image, format, tag = 'final') => at(`/mshub/export/${segment(image)}`, { tag, format });

/** The training at work, or else the last one; null if there never was one. */
export async function training() {
  try {
    return await json('/train/');
  } catch (error) {
    if (error.status === 404) {
      return null;
    }
    throw error;
  }
}

/**
 * Run a model on a series.
 *
 * @returns {Promise<{facts: Object, image: ArrayBuffer}>} the result's parameters, and a raw NRRD
 */
export async function infer(model, image, params, signal) {
  const body = new FormData();
  const wanted = { result_extension: '.nrrd', result_dtype: 'uint8', result_compress: false, grid: 'series' };
  body.append('params', JSON.stringify({ ...wanted, ...params }));
  const address = at(`/infer/${segment(model)}`, { image, output: 'all' });
  const answer = await (await ask(address, { method: 'POST', body, signal })).formData();
  const [facts, label] = [answer.get('params'), answer.get('image')];
  if (!facts || !(label instanceof Blob)) {
    throw new ServerError('The answer holds no label. Expected the parts params and image; look at /logs/.', 200);
  }
  return { facts: JSON.parse(facts instanceof Blob ? await facts.text() : facts), image: await label.arrayBuffer() };
}

/** Store a label of a series; returns what the server made of it. */
export function submit(image, label, params) {
  const body = new FormData();
  body.append('params', JSON.stringify(params));
  body.append('label', label, 'label.nrrd');
  return json(at('/datastore/label', { image, tag: 'final' }), { method: 'PUT', body });
}

/** A stored label: its raw NRRD, and its segments by name. */
export async function stored(image, tag = 'final') {
  const response = await ask(exportAddress(image, 'nrrd', tag));
  const names = JSON.parse(response.headers.get('X-MSHub-Segments') ?? '{}');
  return { names, image: await response.arrayBuffer() };
}
