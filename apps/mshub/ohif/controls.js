/* The parts panels are made of, and how numbers and moments are said. */

import { element } from './dom.js';
import { workbench } from './workbench.js';

export const NAMED_AT_MOST = 6;

export const button = (name, label, { act, reason = null, title = '', look = '' }) =>
  element(
    'button',
    {
      type: 'button',
      class: look,
      'data-cy': `mshub-${name}`,
      'aria-disabled': reason ? 'true' : null,
      title: reason ?? title,
      onclick: () => (reason ? workbench.tell(label, reason, 'warning') : act()),
    },
    label
  );
export const muted = (...text) => element('span', { class: 'mshub-muted' }, ...text);
export const link = (name, label, href, attributes = {}) =>
  element('a', { href, target: '_blank', rel: 'noopener', 'data-cy': `mshub-${name}`, ...attributes }, label);
export const heading = text => element('h3', {}, text);
export const bar = (name, done, total) =>
  element('progress', { 'data-cy': `mshub-${name}`, ...(total ? { value: done, max: total } : {}) });

/** Seconds as a person says them. */
export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) {
    return `${whole} s`;
  }
  const minutes = Math.round(whole / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export const moment = value => {
  const date = new Date(typeof value === 'number' ? value * 1000 : value);
  return Number.isNaN(date.getTime()) ? '' : date.toLocaleString([], { dateStyle: 'medium', timeStyle: 'short' });
};
