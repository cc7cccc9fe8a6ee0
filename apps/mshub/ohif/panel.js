/*
 * A panel as a custom element. It is made of sections; each is drawn again only when what it shows has changed, and
 * keeps the keyboard's focus.
 */

import { workbench } from './workbench.js';

const TYPED_IN = new Set(['INPUT', 'SELECT', 'TEXTAREA']);
const KEYS_OF_CONTROLS = new Set([' ', 'Enter', 'ArrowUp', 'ArrowDown', 'ArrowLeft', 'ArrowRight', 'Home', 'End']);
const KEY_EVENTS = ['keydown', 'keypress', 'keyup'];

export class Panel extends HTMLElement {
  /** Pairs of functions: what a section shows, as plain values, and the nodes that show it. */
  static sections = [];

  connectedCallback() {
    this.classList.add('mshub-panel');
    this.parentElement.classList.add('mshub-page');
    this.drawn = this.constructor.sections.map(() => null);
    this.places = this.constructor.sections.map(() => document.createElement('div'));
    this.replaceChildren(...this.places);
    this.update = () => this.constructor.sections.forEach((section, at) => this.draw(section, at));
    workbench.addEventListener('change', this.update);
    KEY_EVENTS.forEach(name => this.addEventListener(name, keepFromViewer));
    this.update();
  }

  disconnectedCallback() {
    workbench.removeEventListener('change', this.update);
    KEY_EVENTS.forEach(name => this.removeEventListener(name, keepFromViewer));
  }

  draw([values, view], at) {
    const shown = values(workbench);
    const text = JSON.stringify(shown);
    if (text === this.drawn[at]) {
      return;
    }
    this.drawn[at] = text;
    const focused = this.places[at].contains(document.activeElement) && document.activeElement.dataset.cy;
    const scrolled = this.places[at].querySelector('[data-scrolls]')?.scrollTop;
    this.places[at].replaceChildren(...[view(shown)].flat(Infinity).filter(Boolean));
    if (scrolled) {
      this.places[at].querySelector('[data-scrolls]')?.scrollTo(0, scrolled);
    }
    if (focused) {
      this.places[at].querySelector(`[data-cy="${CSS.escape(focused)}"]`)?.focus();
    }
  }
}

/** Keep from OHIF's shortcuts what is typed into a field, and the keys that work a button or a list. */
function keepFromViewer(event) {
  const isField = TYPED_IN.has(event.target.tagName) && event.target.type !== 'radio';
  if (isField || KEYS_OF_CONTROLS.has(event.key)) {
    event.stopPropagation();
  }
}
