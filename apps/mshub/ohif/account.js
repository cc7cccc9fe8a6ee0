/* Who is logged in, and the way out: beside the logo, on every page of the viewer. */

import { element } from './dom.js';
import { account } from './server.js';

export class Account extends HTMLElement {
  async connectedCallback() {
    this.addEventListener('click', keepFromLogo);
    const user = await account();
    this.replaceChildren(...(user ? [nameOf(user), wayOut()] : []));
  }

  disconnectedCallback() {
    this.removeEventListener('click', keepFromLogo);
  }
}

const nameOf = ({ username, role }) =>
  element('span', { 'data-cy': 'mshub-account', title: `Logged in as ${username} (${role})` }, username);

// A form leaves the page as a link does: what was not submitted is asked about first.
const wayOut = () =>
  element('form', { method: 'post', action: '/logout' }, element('button', { 'data-cy': 'mshub-log-out' }, 'Log out'));

/** Keep from OHIF, which takes a click beside the logo for the way back to the study list. */
function keepFromLogo(event) {
  event.stopPropagation();
}
