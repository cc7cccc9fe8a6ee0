/* MSHub's extension of OHIF: three panels, around OHIF's own segmentation panel, and one command for each key. */

import { Account } from './account.js';
import { element } from './dom.js';
import { OutcomePanel, ReviewPanel } from './review-panel.js';
import { SegmentPanel } from './segment-panel.js';
import { windowLinearly } from './voi-lut.js';
import { workbench } from './workbench.js';

export const ID = '@mshub/extension';

const STYLE = '/viewer/extension/panel.css';

// A panel is a custom element: React renders its name like any other tag, and nothing of React's inside is relied on.
const PANELS = { segment: SegmentPanel, outcome: OutcomePanel, review: ReviewPanel };

export default {
  id: ID,

  preRegistration(managers) {
    workbench.connect(managers);
    windowLinearly(window.cornerstone.metaData);
    document.head.append(element('link', { rel: 'stylesheet', href: STYLE }));
    customElements.define('mshub-account', Account);
    Object.entries(PANELS).forEach(([name, panel]) => customElements.define(`mshub-${name}`, panel));
  },

  getPanelModule: () =>
    Object.keys(PANELS).map(name => ({
      name,
      iconName: 'tab-segmentation',
      iconLabel: 'MSHub',
      label: 'MSHub',
      component: `mshub-${name}`,
    })),

  getCommandsModule: () => ({
    definitions: {
      mshubSegment: { commandFn: () => workbench.segment() },
      mshubSubmit: { commandFn: () => workbench.submit() },
      mshubNext: { commandFn: () => workbench.next() },
    },
    defaultContext: 'DEFAULT',
  }),
};
